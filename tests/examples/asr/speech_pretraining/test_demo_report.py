# SPDX-License-Identifier: Apache-2.0
import json

import pytest


def row(context, part, loss, accuracy=0.25):
    return dict(context=context, part=part, loss=loss, accuracy=accuracy, unigram_entropy=4.0, commonest=0.1)


@pytest.mark.parametrize(
    'parts, told', [(['masked'], 'masked'), (['next_0', 'next'], 'next'), (['masked', 'next'], 'next')]
)
def test_the_figures_of_a_context_are_those_of_the_whole_objective(load_example, tmp_path, parts, told):
    start, end = (
        {'contexts': [row(c, part, loss, len(part)) for c in ([10, 0], [-1, 0]) for part in parts]}
        for loss in (6.0, float('nan'))
    )
    recogniser = {'pretrained': {'10_0': 0.2}, 'scratch': {'10_0': 0.4}}
    load_example('demo_report').write_learned(tmp_path / 'learned.json', [start, end], recogniser)
    learned = json.loads((tmp_path / 'learned.json').read_text())
    assert list(learned['contexts']) == ['10_0', 'unlimited_0'] and learned['recogniser'] == recogniser
    assert learned['contexts']['10_0'] == dict(
        part=told,
        loss_start=6.0,
        loss_end=None,
        unigram_entropy=4.0,
        accuracy_end=len(told),
        commonest_share=0.1,
    )


@pytest.mark.parametrize('parts, shown', [(['masked'], False), (['next_0', 'next'], True), (['masked', 'next'], True)])
def test_the_table_says_what_each_row_is_of(load_example, parts, shown):
    figures = dict(
        loss=3.0, loss_interval=[2.9, 3.1], accuracy=0.25, accuracy_interval=[0.2, 0.3], unigram_entropy=4.0
    )
    row = dict(context=[10, 0], commonest=0.1, look_ahead_ms=0, utterances=4, not_compared=None, **figures)
    result = dict(
        contexts=[{**row, 'part': part} for part in parts],
        codebook=dict(codes_used=60, classes=64, perplexity=41.0, top_share=0.1),
        not_compared=[],
    )
    table = load_example('demo_report').learning_table(result, result)
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert ('part' in columns) == shown and ('masked frames' in table.title) != shown
    if shown:
        assert columns['part'] == parts
    assert columns['unigram entropy'] == ['4.000'] * len(parts)
    assert columns['loss at start'] == ['3.000'] * len(parts)
