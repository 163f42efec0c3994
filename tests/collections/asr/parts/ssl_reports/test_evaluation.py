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
    evaluate,
    loss_difference,
    ratio_of_sums,
    summarize,
    why_not_compared,
)

SECONDS = (3.0, 2.0, 1.2)
HORIZONS = ['next_0', 'next_1', 'next_2', 'next_3']
NEXT_TOKEN, BOTH = '+model.objective=next_token', '+model.objective=both'


def frames(likelihood, correct, utterances, targets):
    """Scores of frames, from lists."""
    return FrameScores(
        torch.tensor(likelihood), torch.tensor(correct), torch.tensor(utterances), torch.tensor(targets)
    )


def scores_of(*utterances):
    """Scores with these negative log-likelihoods of the frames of each utterance; every second frame is correct."""
    scores = UtteranceScores(classes=8)
    for values in utterances:
        correct = [float(index % 2) for index in range(len(values))]
        scores.add([frames(values, correct, [0] * len(values), [0] * len(values))], 1)
    return scores


def test_sums_of_utterances_over_draws():
    scores = UtteranceScores(classes=8)
    first = frames([1.0, 2.0, 4.0], [1.0, 0.0, 1.0], [0, 0, 2], [5, 5, 1])
    second = frames([8.0], [0.0], [2], [5])
    scores.add([first, second], utterances=3)
    scores.add([first], utterances=3)
    assert scores.columns().tolist() == [[3, 0, 12, 3, 0, 4], [1, 0, 1, 1, 0, 1], [2, 0, 2, 2, 0, 1]]


def test_the_majority_class_and_the_entropy_of_the_unigrams():
    scores = UtteranceScores(classes=4, books=2)
    assert scores.majority_class == scores.unigram_entropy == 0
    for targets in ([[0, 3], [0, 1]], [[0, 2], [2, 3]]):
        scores.add([frames([1.0, 1.0], [0.0, 0.0], [0, 0], targets)], 1)
    shares = np.array([3, 1]) / 4, np.array([2, 1, 1]) / 4  # of tokens 0 and 2, and of 3, 1 and 2
    assert scores.majority_class == pytest.approx((0.75 + 0.5) / 2)
    assert scores.unigram_entropy == pytest.approx(np.mean([-(share * np.log(share)).sum() for share in shares]))


def test_digests_stand_for_the_targets_of_each_utterance_in_their_order():
    def digests(*draws):
        scores = UtteranceScores(classes=9)
        scores.add([frames([1.0] * len(at), [1.0] * len(at), at, targets) for at, targets in draws], utterances=2)
        return scores.digests().tolist()

    one = digests(([0, 0, 1], [3, 4, 5]))
    assert one == digests(([0, 0], [3, 4]), ([1], [5]))
    swapped, other = digests(([0, 0, 1], [4, 3, 5])), digests(([0, 0, 1], [3, 4, 6]))
    assert (swapped[0] != one[0], swapped[1] == one[1]) == (True, True)
    assert (other[0] == one[0], other[1] != one[1]) == (True, True)


def test_estimates():
    found = summarize(scores_of([1.0, 3.0], [2.0, 2.0, 2.0, 6.0]), resamples=50, confidence=0.9, seed=0)
    assert found['loss'].value == pytest.approx(16 / 6) and found['accuracy'].value == 0.5
    assert (found['loss'].low, found['loss'].high) == (2, 3)  # both utterances are the first one, or the second
    assert found['perplexity'].value == pytest.approx(math.exp(16 / 6)) and found['perplexity'].high == math.exp(3)
    again = summarize(scores_of([1.0, 3.0], [2.0, 2.0, 2.0, 6.0]), resamples=50, confidence=0.9, seed=0)
    assert found == again
    single = summarize(scores_of([1.0, 3.0]), resamples=50, confidence=0.9, seed=0)['loss']
    assert single.value == 2 and math.isnan(single.low) and math.isnan(single.high)


def test_intervals_hold_the_true_value_about_as_often_as_they_say():
    generator, inside = np.random.default_rng(0), 0
    for trial in range(100):
        frames = generator.integers(5, 30, size=40)
        means = generator.normal(2.0, 0.5, size=40)  # frames of an utterance are alike
        estimate = ratio_of_sums(means * frames, frames.astype(float), 200, 0.9, seed=trial)
        inside += estimate.low <= 2.0 <= estimate.high
    assert 80 <= inside <= 97


def test_differences_are_paired():
    one, other = scores_of([1.0, 3.0], [5.0, 5.0]), scores_of([1.5, 3.5], [5.5, 5.5])
    difference = loss_difference(other, one, resamples=20, confidence=0.9, seed=0)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.integration
def test_it_agrees_with_validation_and_with_any_cut_into_batches():
    model, contexts = tiny_model(), [[10, 0], [40, 0]]
    found = evaluate(model, batches(2, SECONDS), contexts, seed=0, window=Window(AttContext(10, 0)))
    run = trainer(1)
    model.set_trainer(run)
    reported = run.validate(model, dataloaders=batches(2, SECONDS), verbose=False)[0]
    for label in ('10_0', '40_0'):
        likelihood, correct, frames = found.contexts[label].columns().sum(axis=1)
        assert likelihood / frames == pytest.approx(reported[f'val_loss/ctx_{label}'], rel=1e-5)
        assert correct / frames == pytest.approx(reported[f'val_accuracy/ctx_{label}'], rel=1e-5)
    assert found.contexts['10_0'].columns().shape == (3, 6) and 0 < found.contexts['10_0'].majority_class < 1
    assert found.codebook['classes'] == 32 and 1 < found.codebook['codes_used'] <= 32

    twice = (
        evaluate(model, [noise_batch(SECONDS)], contexts, seed=0, window=Window(AttContext(10, 0)), draws=2)
        .contexts['10_0']
        .columns()
    )
    window = Window(AttContext(10, 0))
    once = [
        evaluate(model, [noise_batch(SECONDS)], contexts, seed, window).contexts['10_0'].columns() for seed in (0, 1)
    ]
    np.testing.assert_allclose(twice, once[0] + once[1], rtol=1e-5)


def shares_of(found, part, label='10_0'):
    """Loss, accuracy and number of frames of a part in a context."""
    likelihood, correct, count = found.parts[part][label].columns().sum(axis=1)
    return likelihood / count, correct / count, count


@pytest.mark.integration
def test_each_objective_has_its_parts_and_both_answers_the_questions_of_either():
    contexts, window = [[10, 0], [40, 0]], Window(AttContext(10, 0))
    both = tiny_model(BOTH)
    models = {'both': both, 'masked': tiny_model(seed=1), 'next_token': tiny_model(NEXT_TOKEN, seed=1)}
    for model in models.values():
        model.load_state_dict(both.state_dict())
    found = {name: evaluate(model, batches(2, SECONDS), contexts, 0, window) for name, model in models.items()}
    assert list(found['masked'].parts) == ['masked'] and not found['masked'].offsets
    assert list(found['next_token'].parts) == [*HORIZONS, 'next'] and found['both'].offsets == {'10_0': 0, '40_0': 0}
    assert list(found['both'].parts) == ['masked', *HORIZONS, 'next']
    with pytest.raises(KeyError, match='masked'):
        _ = found['next_token'].contexts
    for other in ('masked', 'next_token'):
        for part in found[other].parts:
            for label in ('10_0', '40_0'):
                assert why_not_compared(found['both'], found[other], part, label) is None
                pair = (found[name].parts[part][label] for name in ('both', other))
                np.testing.assert_allclose(*(scores.columns() for scores in pair), rtol=1e-5)
    assert why_not_compared(found['both'], found['masked'], 'next_0', '10_0') == 'the first has no such part'
    assert why_not_compared(found['masked'], found['both'], 'next_0', '10_0') == 'it has no such part'


@pytest.mark.integration
@pytest.mark.parametrize('books', [[], ['model.num_books=2', 'model.squeeze_single=false']], ids=['one', 'two'])
def test_next_tokens_agree_with_validation_and_horizons_add_up(books):
    model = tiny_model(NEXT_TOKEN, *books)
    found = evaluate(model, batches(2, SECONDS), [[10, 0], [40, 0]], draws=3)  # draws are of masks
    run = trainer(1)
    model.set_trainer(run)
    reported = run.validate(model, dataloaders=batches(2, SECONDS), verbose=False)[0]
    for part, place in [(part, f'/{part}') for part in HORIZONS] + [('next', '')]:
        loss, accuracy, _ = shares_of(found, part)
        assert loss == pytest.approx(reported[f'val_loss/ctx_10_0{place}'], rel=1e-5)
        assert accuracy == pytest.approx(reported[f'val_accuracy/ctx_10_0{place}'], rel=1e-5)
    columns = [found.parts[part]['10_0'].columns() for part in HORIZONS]
    np.testing.assert_allclose(sum(columns), found.parts['next']['10_0'].columns())
    counts = [column[2].sum() for column in columns]
    assert counts == sorted(counts, reverse=True) and counts[0] == counts[1] + 6  # one less in each utterance

    tokens = [[], []] if books else [[]]  # of the first horizon: all but those behind the last frame
    for batch in batches(2, SECONDS):
        record = model.encode_batch(batch, None)
        for row, length in zip(record.tokens, torch.minimum(record.token_lengths, record.encoded_lengths)):
            for book, held in enumerate(tokens):
                held += (row[:length, book] if books else row[:length]).tolist()
    shares = [np.unique(held, return_counts=True)[1] / len(held) for held in tokens]
    entropy = np.mean([-(share * np.log(share)).sum() for share in shares])
    assert found.parts['next_0']['10_0'].unigram_entropy == pytest.approx(entropy)
    assert found.parts['next_0']['10_0'].majority_class == pytest.approx(np.mean([share.max() for share in shares]))


@pytest.mark.integration
def test_what_is_not_the_same_question_is_not_compared():
    chunks = ['model.encoder.att_context_style=chunked_limited', 'model.encoder.att_context_size=[[8,3]]']
    first = tiny_model(NEXT_TOKEN)

    def found(*overrides, contexts=([10, 0],), window=Window(AttContext(10, 0)), seed=0):
        model = tiny_model(*overrides, seed=seed)
        if not seed:
            model.quantizer.load_state_dict(first.quantizer.state_dict())
        return evaluate(model, [noise_batch(SECONDS)], contexts, 0, window)

    one = found(BOTH)
    four, two = found(NEXT_TOKEN), found(NEXT_TOKEN, '+model.next_token.horizons=2')
    assert why_not_compared(four, one, 'next', '10_0') is None
    assert why_not_compared(two, one, 'next_1', '10_0') is None
    assert why_not_compared(two, one, 'next', '10_0') == 'it has 2 horizons, the first 4'
    assert why_not_compared(found(BOTH, seed=1), one, 'masked', '10_0').startswith('its targets are other tokens')
    other_masks = found('model.masking.mask_prob=0.01')
    assert why_not_compared(other_masks, one, 'masked', '10_0') == (
        'other frames are masked for it: its masking has other settings'
    )
    assert why_not_compared(found(BOTH, contexts=[[20, 0]]), one, 'next', '20_0') == (
        'the first was not run in this context'
    )
    hears_six = found(NEXT_TOKEN, 'model.encoder.n_layers=2', contexts=[[8, 3]])
    hears_three = found(NEXT_TOKEN, 'model.encoder.n_layers=2', *chunks, contexts=[[8, 3]])
    assert why_not_compared(hears_six, hears_three, 'next_0', '8_3') == (
        "its horizons begin 6 tokens after a frame's own, the first's 3"
    )
    with pytest.raises(ValueError, match='the receptive field is the whole utterance'):
        found(NEXT_TOKEN, contexts=[[-1, -1]])
