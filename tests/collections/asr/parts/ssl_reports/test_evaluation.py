# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from tiny_nest import batches, noise_batch, tiny_model, trainer

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.objectives.base import FrameScores
from nemo.collections.asr.parts.ssl_reports.evaluation import (
    UtteranceScores,
    compare_models,
    evaluate,
    loader_of,
    ratio_of_sums,
    why_not_compared,
)

SECONDS = (3.0, 2.0, 1.2)
HORIZONS = ['next_0', 'next_1', 'next_2', 'next_3']
NEXT_TOKEN, BOTH = '+model.objective=next_token', '+model.objective=both'
LEFT_10 = Window(AttContext(10, 0))


def frames(likelihood, correct, utterances, targets):
    """Scores of frames, from lists."""
    return FrameScores(*map(torch.tensor, (likelihood, correct, utterances, targets)))


def same_targets(*overrides, seed=1):
    """Return a model of other weights, with the quantizer of ``tiny_model()``."""
    model = tiny_model(*overrides, seed=seed)
    model.quantizer.load_state_dict(tiny_model().quantizer.state_dict())
    return model


def compare(models, speech_corpus, contexts):
    manifest = str(speech_corpus / 'validation_manifest.json')
    loaders = {name: loader_of(model, manifest, batch_size=8) for name, model in models.items()}
    return compare_models(models, dict.fromkeys(models, contexts), loaders, resamples=50)


def test_sums_of_utterances_over_horizons():
    scores = UtteranceScores(classes=8)
    first = frames([1.0, 2.0, 4.0], [1.0, 0.0, 1.0], [0, 0, 2], [5, 5, 1])
    second = frames([8.0], [0.0], [2], [5])
    scores.add([first, second], utterances=3)
    scores.add([first], utterances=3)
    assert scores.columns().tolist() == [[3, 0, 12, 3, 0, 4], [1, 0, 1, 1, 0, 1], [2, 0, 2, 2, 0, 1]]


def test_the_majority_class_and_the_entropy_of_the_unigrams():
    scores = UtteranceScores(classes=4, books=2)
    assert set(scores.baselines().values()) == {0}
    for targets in ([[0, 3], [0, 1]], [[0, 2], [2, 3]]):
        scores.add([frames([1.0, 1.0], [0.0, 0.0], [0, 0], targets)], 1)
    shares = np.array([3, 1]) / 4, np.array([2, 1, 1]) / 4  # of tokens 0 and 2, and of 3, 1 and 2
    entropy = np.mean([-(share * np.log(share)).sum() for share in shares])
    expected = {'majority_class': (0.75 + 0.5) / 2, 'unigram_entropy': entropy}
    assert scores.baselines() == pytest.approx(expected)


def test_a_mean_per_frame_and_its_interval():
    sums, counts = np.array([4.0, 12.0]), np.array([2.0, 4.0])
    value, *bounds = ratio_of_sums(sums, counts, resamples=50, confidence=0.9, seed=0)
    assert value == pytest.approx(16 / 6) and bounds == [2, 3]  # both utterances are the first one, or the second
    value, *bounds = ratio_of_sums(sums[:1], counts[:1], 50, 0.9, 0)
    assert value == 2 and all(map(math.isnan, bounds))


@pytest.mark.integration
@pytest.mark.parametrize('objective', [(), (NEXT_TOKEN,), (NEXT_TOKEN, 'model.num_books=2')])
def test_it_agrees_with_validation(objective):
    model, contexts = (
        tiny_model(*objective, *['model.squeeze_single=false'] * (len(objective) > 1)),
        [[10, 0], [40, 0]],
    )
    found = evaluate(model, batches(2, SECONDS), contexts, window=LEFT_10)
    run = trainer(1)
    model.set_trainer(run)
    reported = run.validate(model, dataloaders=batches(2, SECONDS), verbose=False)[0]
    places = {'masked': ''} if not objective else {'next': '', **{part: f'/{part}' for part in HORIZONS}}
    for part, place in places.items():
        for label in ('10_0', '40_0'):
            likelihood, correct, count = found.parts[part][label].columns().sum(axis=1)
            assert likelihood / count == pytest.approx(reported[f'val_loss/ctx_{label}{place}'], rel=1e-5)
            assert correct / count == pytest.approx(reported[f'val_accuracy/ctx_{label}{place}'], rel=1e-5)
    assert found.codebook['classes'] == 32 and 1 < found.codebook['codes_used'] <= 32
    if objective:
        columns = [found.parts[part]['10_0'].columns() for part in HORIZONS]
        np.testing.assert_allclose(sum(columns), found.parts['next']['10_0'].columns())
        counts = [column[2].sum() for column in columns]
        assert counts == sorted(counts, reverse=True) and counts[0] == counts[1] + 6  # one less in each utterance


@pytest.mark.integration
def test_both_objectives_predict_as_either_alone():
    both = tiny_model(BOTH)
    models = {'both': both, 'masked': tiny_model(seed=1), 'next_token': tiny_model(NEXT_TOKEN, seed=1)}
    for model in models.values():
        model.load_state_dict(both.state_dict())
    found = {name: evaluate(model, batches(2, SECONDS), [[10, 0]], 0, LEFT_10) for name, model in models.items()}
    assert {name: list(scores.parts) for name, scores in found.items()} == {
        'both': ['masked', *HORIZONS, 'next'],
        'masked': ['masked'],
        'next_token': [*HORIZONS, 'next'],
    }
    for other in ('masked', 'next_token'):
        for part in found[other].parts:
            assert why_not_compared(found['both'], found[other], part, '10_0') is None
            pair = (found[name].parts[part]['10_0'] for name in ('both', other))
            np.testing.assert_allclose(*(scores.columns() for scores in pair), rtol=1e-5)


@pytest.mark.integration
def test_what_is_not_the_same_question_is_not_compared():
    chunks = ['model.encoder.att_context_style=chunked_limited', 'model.encoder.att_context_size=[[8,3]]']

    def found(*overrides, contexts=([10, 0],), make=same_targets):
        return evaluate(make(*overrides), [noise_batch(SECONDS)], contexts, 0, LEFT_10)

    one, four = found(BOTH), found(NEXT_TOKEN)
    two = found(NEXT_TOKEN, '+model.next_token.horizons=2')
    deep = [
        found(NEXT_TOKEN, 'model.encoder.n_layers=2', *style, contexts=[[8, 3]]) for style in ((), chunks)
    ]  # with chunks the look-ahead does not add up over layers
    assert why_not_compared(two, one, 'next_1', '10_0') is None
    for scores, reference, part, label, reason in (
        (two, one, 'next', '10_0', 'other frames or tokens'),
        (four, found(), 'next_0', '10_0', 'the first has no such part'),
        (found('model.masking.mask_prob=0.01'), one, 'masked', '10_0', 'other frames or tokens'),
        (
            found(BOTH, contexts=[[20, 0]]),
            one,
            'next',
            '20_0',
            'the first has no such part, or was not run in this context',
        ),
        (*deep, 'next_0', '8_3', 'other frames or tokens'),
    ):
        assert (why_not_compared(scores, reference, part, label) or '').startswith(reason)
    other = found(BOTH, make=lambda *overrides: tiny_model(*overrides, seed=5))
    assert why_not_compared(other, one, 'masked', '10_0').startswith('its targets are other tokens')
    with pytest.raises(ValueError, match='the receptive field is the whole utterance'):
        found(NEXT_TOKEN, contexts=[[-1, -1]])


@pytest.mark.integration
def test_models_of_several_objectives_are_compared_where_they_predict_the_same(speech_corpus):
    models = {
        'both': same_targets(BOTH),
        'masked': same_targets(seed=2),
        'next': same_targets(NEXT_TOKEN),
        'other': tiny_model(seed=1),
    }
    results = compare(models, speech_corpus, [[10, 0], [-1, 0]])
    both, masked, following, other = results
    assert [result['mask_context'] for result in results] == [10, 10, None, 10]
    for row in (row for result in results for row in result['contexts']):
        low, high = row['loss_interval']
        assert low <= row['loss'] <= high and row['look_ahead_ms'] == 0
    for result in (both, other):
        assert {row['loss_difference'] for row in result['contexts']} == {None}
    for result, first in ((masked, both['contexts'][0]), (following, both['contexts'][1])):
        row = result['contexts'][0]
        assert row['loss_difference'] == pytest.approx(row['loss'] - first['loss'], abs=1e-6)
        assert row['frames'] == first['frames'] and row['not_compared'] is None
    (reason,) = {row['not_compared'] for row in other['contexts']}
    assert reason.startswith('its targets are other tokens')
