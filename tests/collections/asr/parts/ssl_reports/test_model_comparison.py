# SPDX-License-Identifier: Apache-2.0
import pytest
from tiny_nest import tiny_model

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.ssl_reports.model_comparison import (
    ComparisonOptions,
    compare_models,
    contexts_of,
    loader_of,
    masking_window,
    reasons_of,
)

HORIZONS = ['next_0', 'next_1', 'next_2', 'next_3', 'next']
CONTEXTS = [[10, 0], [-1, 0]]
QUICK = ComparisonOptions(resamples=50)


def same_targets(*overrides, seed=1):
    """Return a model of other weights, with the quantizer of ``tiny_model()``."""
    model = tiny_model(*overrides, seed=seed)
    model.quantizer.load_state_dict(tiny_model().quantizer.state_dict())
    return model


def compare(models, speech_corpus, contexts, options=QUICK, batch_size=8):
    manifest = str(speech_corpus / 'validation_manifest.json')
    batches = {name: loader_of(model, manifest, batch_size) for name, model in models.items()}
    return compare_models(models, dict.fromkeys(models, contexts), batches, options)


@pytest.mark.integration
def test_models_of_several_objectives_are_compared_where_they_predict_the_same(speech_corpus):
    models = {
        'both': same_targets('+model.objective=both'),
        'masked': same_targets(seed=2),
        'next': same_targets('+model.objective=next_token'),
        'other': tiny_model(seed=1),
    }
    both, masked, following, other = compare(models, speech_corpus, CONTEXTS)
    parts = [
        [row['part'] for row in result['contexts'][: len(result['contexts']) // 2]]
        for result in (both, masked, following, other)
    ]
    assert parts == [['masked', *HORIZONS], ['masked'], HORIZONS, ['masked']]
    assert [result['mask_context'] for result in (both, masked, following, other)] == [10, 10, None, 10]
    for result in (both, masked, following, other):
        for row in result['contexts']:
            low, high = row['loss_interval']
            assert low <= row['loss'] <= high and row['look_ahead_ms'] == 0
            assert row['below_unigram'] == pytest.approx(row['unigram_entropy'] - row['loss'])
            assert (row['next_token_offset'] is None) == (row['part'] == 'masked')
    assert (
        {row['loss_difference'] for row in both['contexts']}
        == {None}
        == {row['not_compared'] for row in both['contexts']}
    )
    for result, first in ((masked, both['contexts'][0]), (following, both['contexts'][1])):
        row = result['contexts'][0]
        assert row['loss_difference'] == pytest.approx(row['loss'] - first['loss'], abs=1e-6)
        assert row['frames'] == first['frames'] and reasons_of(result) == []
    assert {row['loss_difference'] for row in other['contexts']} == {None}
    (reason,) = reasons_of(other)
    assert reason.startswith('masked in [10, 0], [-1, 0]: its targets are other tokens')


@pytest.mark.integration
def test_batches_and_draws(speech_corpus):
    found = []
    for batch_size in (1, 5):
        options = ComparisonOptions(draws=2, resamples=50)
        (result,) = compare({'a': tiny_model()}, speech_corpus, [[10, 0]], options, batch_size)
        found.append(result['contexts'][0])
    assert found[0]['frames'] == found[1]['frames']
    assert found[0]['loss'] == pytest.approx(found[1]['loss'], rel=1e-4)
    (once,) = compare({'a': tiny_model()}, speech_corpus, [[10, 0]])
    assert found[0]['frames'] > 1.5 * once['contexts'][0]['frames']


def test_a_model_that_cannot_be_evaluated_is_named():
    with pytest.raises(ValueError, match='a.nemo: object predicts neither masked nor next tokens'):
        contexts_of(object(), 'all', 'a.nemo')
    model = tiny_model('+model.objective=next_token')
    assert contexts_of(model, 'first', 'a.nemo') == [[10, 0]]
    with pytest.raises(ValueError, match=r'a.nemo: .*\[-1, -1\]'):
        contexts_of(model, [[-1, -1]], 'a.nemo')


def test_masks_follow_the_models_that_mask():
    models = {'masked': tiny_model(), 'next': tiny_model('+model.objective=next_token')}
    contexts = {'masked': [[40, 0]], 'next': [[10, 0]]}
    assert masking_window(models, contexts, None) == Window(AttContext(40, 0))
    assert masking_window(models, contexts, 7) == Window(AttContext(7, 0))
    assert masking_window({'next': models['next']}, contexts, 7) is None
