# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
import json

import pytest


@pytest.fixture(scope='module')
def tools(load_example):
    return load_example('evaluation_tools')


@pytest.mark.unit
def test_a_value_with_its_interval(tools):
    row = {'loss': 3.0634, 'loss_interval': [3.0211, 3.102]}
    assert tools.with_interval(row, 'loss', '{:.3f}') == '3.063 [3.021, 3.102]'


@pytest.mark.unit
def test_what_is_not_a_number_is_written_as_null(tools, tmp_path):
    results = [{'model': 'a.nemo', 'contexts': [{'context': [4, 0], 'loss': float('nan')}]}]
    tools.write_results(tmp_path / 'made.json', results, {'seed': 0})
    written = json.loads((tmp_path / 'made.json').read_text())
    assert written['settings'] == {'seed': 0} and written['models'][0]['contexts'][0]['loss'] is None


@pytest.mark.unit
def test_a_model_that_predicts_no_masked_tokens_is_named(tools):
    with pytest.raises(ValueError, match='a.nemo: object predicts no masked tokens'):
        tools.contexts_of(object(), 'all', 'a.nemo')
