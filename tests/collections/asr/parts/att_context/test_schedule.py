# SPDX-License-Identifier: Apache-2.0
import pytest
from omegaconf import OmegaConf

from nemo.collections.asr.parts.att_context import AttContext, ContextSchedule, parse_layer_contexts

NEST = [[0, [40, 0]], [6, [120, 0]], [12, [320, 0]]]


def lefts(value, layers, **kwargs):
    contexts = parse_layer_contexts(value, layers, 'field', **kwargs)
    return [None if context is None else context.left for context in contexts]


class TestLayerContexts:
    @pytest.mark.parametrize('value', [NEST, OmegaConf.create(NEST), tuple((i, AttContext(*c)) for i, c in NEST)])
    def test_each_layer_takes_the_last_anchor_at_or_below_it(self, value):
        assert lefts(value, 17) == [40] * 6 + [120] * 6 + [320] * 5

    def test_layers_below_the_first_anchor_have_none(self):
        assert lefts([[2, [40, 0]]], 4) == [None, None, 40, 40]

    def test_one_context_per_layer(self):
        contexts = parse_layer_contexts([[4, 0], None, 'low', [-1, -1]], 4, 'field')
        assert contexts == (AttContext(4, 0), None, AttContext(160, 0), AttContext(-1, -1))

    def test_a_left_context_alone_in_a_list(self):
        assert parse_layer_contexts([[40], None], 2, 'field') == (AttContext(40, 0), None)
        assert parse_layer_contexts([[0, [40]], [1, (-1,)]], 2, 'field') == (AttContext(40, 0), AttContext(-1, 0))
        assert parse_layer_contexts(OmegaConf.create([[0, [40]]]), 2, 'field') == (AttContext(40, 0),) * 2

    def test_linear_interpolation(self):
        value = {'anchors': [[0, [4, 0]], [4, [12, 4]]], 'interpolate': 'linear'}
        contexts = parse_layer_contexts(OmegaConf.create(value), 6, 'field')
        assert [tuple(context) for context in contexts] == [(4, 0), (6, 1), (8, 2), (10, 3), (12, 4), (12, 4)]

    def test_interpolated_contexts_are_whole_chunks(self):
        value = {'anchors': [[0, [4, 3]], [4, [16, 3]]], 'interpolate': 'linear'}
        assert lefts(value, 5, multiple=4) == [4, 4, 8, 12, 16]

    @pytest.mark.parametrize(
        'value, index, shown, allowed',
        [
            ([[0, [4, 0]], ['1', [4, 0]]], 1, "'1'", 'a whole number, from 0 to 7'),
            ([[0, [4, 0]], [8, [4, 0]]], 1, '8', 'from 0 to 7'),
            ([[0, [4, 0]], [3, 4]], 1, '[3, 4]', 'a pair [left, right]'),
            ([[0, [4, 0, 0]]], 0, '[4, 0, 0]', '[left, right]'),
            ([[0, [-2, 0]]], 0, '-2', '-1 for unlimited'),
            ([[0, 'lowest']], 0, "'lowest'", 'very_low'),
            ([[3, [4, 0]], [1, [8, 0]]], 1, 'layer 1 follows layer 3', 'must rise'),
            ([[4, 0]] * 7 + [[-2, 0]], 7, '-2', '-1 for unlimited'),
        ],
    )
    def test_a_bad_item_is_named_with_its_index_its_value_and_what_is_allowed(self, value, index, shown, allowed):
        with pytest.raises(ValueError) as error:
            parse_layer_contexts(value, 8, 'encoder.layer_att_context_size')
        for part in (f'encoder.layer_att_context_size: item {index}, ', shown, allowed):
            assert part in str(error.value)

    @pytest.mark.parametrize(
        'value, message',
        [
            ([], 'not empty'),
            ('high', 'must be a list'),
            ([[4, 0]] * 3, '3 contexts, the encoder 8 layers'),
            ({'layers': NEST}, 'anchors and interpolate'),
            ({'anchors': [[0, [4, 0]]], 'interpolate': 'cubic'}, "'cubic'"),
            (
                {'anchors': [[0, [4, 0]], [3, [-1, 0]]], 'interpolate': 'linear'},
                'from [4, 0] to [-1, 0] a side becomes',
            ),
        ],
    )
    def test_a_bad_schedule_is_named(self, value, message):
        with pytest.raises(ValueError) as error:
            parse_layer_contexts(value, 8, 'encoder.layer_att_context_size')
        assert 'encoder.layer_att_context_size' in str(error.value) and message in str(error.value)

    def test_a_zero_left_context_warns(self, warnings):
        parse_layer_contexts([[0, [4, 0]], [2, [0, 0]]], 8, 'field')
        assert len(warnings) == 1 and 'item 1, [2, [0, 0]]' in warnings[0]


def test_a_falling_linear_path():
    schedule = ContextSchedule.parse([[0, [8, 0]], [4, [0, 0]]], 'field', 'step', interpolate='linear')
    assert [schedule.at(step).left for step in range(6)] == [8, 6, 4, 2, 0, 0]
