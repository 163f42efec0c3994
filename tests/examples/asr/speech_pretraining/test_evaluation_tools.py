# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from tiny_nest import tiny_model

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window


@pytest.fixture(scope='module')
def tools(load_example):
    return load_example('evaluation_tools')


def test_a_value_with_its_interval(tools):
    row = {'loss': 3.0634, 'loss_interval': [3.0211, 3.102]}
    assert tools.with_interval(row, 'loss', '{:.3f}') == '3.063 [3.021, 3.102]'


def test_what_is_not_a_number_is_written_as_null(tools, tmp_path):
    results = [{'model': 'a.nemo', 'contexts': [{'context': [4, 0], 'loss': float('nan')}]}]
    tools.write_results(tmp_path / 'made.json', results, {'seed': 0})
    written = json.loads((tmp_path / 'made.json').read_text())
    assert written['settings'] == {'seed': 0} and written['models'][0]['contexts'][0]['loss'] is None


def test_a_model_that_cannot_be_asked_is_named(tools):
    with pytest.raises(ValueError, match='a.nemo: object predicts neither masked nor next tokens'):
        tools.contexts_of(object(), 'all', 'a.nemo')
    model = tiny_model('+model.objective=next_token')
    assert tools.contexts_of(model, 'first', 'a.nemo') == [[10, 0]]
    with pytest.raises(ValueError, match=r'a.nemo: .* \[-1, -1\] an output hears the whole utterance'):
        tools.contexts_of(model, [[-1, -1]], 'a.nemo')


def test_masks_follow_the_models_that_mask(tools):
    models = {'masked': tiny_model(), 'next': tiny_model('+model.objective=next_token')}
    contexts = {'masked': [[40, 0]], 'next': [[10, 0]]}
    assert tools.masking_window(models, contexts, None) == Window(AttContext(40, 0))
    assert tools.masking_window(models, contexts, 7) == Window(AttContext(7, 0))
    assert tools.masking_window({'next': models['next']}, contexts, 7) is None


def test_reasons_in_words(tools):
    rows = [{'context': [10, 0]}, {'context': [40, 0]}, {'context': [40, 0]}]
    missing = {'why': 'it has no such part', 'parts': ['next_0', 'next'], 'contexts': [[10, 0], [40, 0]]}
    elsewhere = {'why': 'the first was not asked in this context', 'parts': ['masked'], 'contexts': [[40, 0]]}
    assert tools.reasons_of({'contexts': rows, 'not_compared': [missing, elsewhere]}) == [
        'next_0, next: it has no such part',
        'masked in [40, 0]: the first was not asked in this context',
    ]
