# SPDX-License-Identifier: Apache-2.0
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo.collections.asr.parts.att_context.context import (
    UNLIMITED,
    AttContext,
    draw_index,
    tightest,
)

sides = st.integers(-1, 400)
contexts = st.builds(AttContext, sides, sides)
EXPECTED_DRAWS = [2, 0, 1, 1, 2, 1, 1, 1, 3, 1, 3, 3]


class TestAttContext:
    @pytest.mark.parametrize(
        'written, expected',
        [
            ([80, 0], (80, 0)),
            ((70, 13), (70, 13)),
            (OmegaConf.create([-1, 4]), (-1, 4)),
            (40, (40, 0)),
            (-1, (-1, 0)),
            (AttContext(5, 1), (5, 1)),
            ('very_low', (80, 0)),
            ('low', (160, 0)),
            ('medium', (240, 0)),
            ('high', (320, 0)),
            ('unlimited', (-1, 0)),
        ],
    )
    def test_parse(self, written, expected):
        parsed = AttContext.parse(written)
        assert (parsed.left, parsed.right) == tuple(parsed) == expected
        assert parsed.as_list() == list(expected)
        assert parsed == AttContext(*expected) and hash(parsed) == hash(AttContext(*expected))

    @pytest.mark.parametrize(
        'written',
        [[-2, 0], [0, -2], [80], [80, 0, 0], [], [80.0, 0], ['80', 0], [True, 0], True, None, 1.5, -2, 'lowest', {}],
    )
    def test_a_bad_value_is_named_with_its_field(self, written):
        with pytest.raises(ValueError) as error:
            AttContext.parse(written, field='model.encoder.att_context_size[2]')
        assert str(error.value).startswith('model.encoder.att_context_size[2]: ')
        named = written if not isinstance(written, list) or len(written) != 2 else min(written, key=repr)
        assert repr(named) in str(error.value)
        if written == 'lowest':
            assert 'very_low, low, medium, high, unlimited' in str(error.value)

    @given(contexts, contexts, contexts)
    def test_intersection_is_what_both_see(self, first, second, third):
        both = first.intersect(second)
        for frame in range(-410, 411, 3):
            assert sees(both, frame) == (sees(first, frame) and sees(second, frame))
        assert both == second.intersect(first) and first.intersect(first) == first
        assert both.intersect(third) == first.intersect(second.intersect(third))


def sees(context, distance):
    """Whether a frame at this distance, negative in the past, is visible."""
    limit = context.left if distance < 0 else context.right
    return limit == UNLIMITED or abs(distance) <= limit


@pytest.mark.parametrize('values, expected', [((), -1), ((-1, -1), -1), ((80, 40, -1), 40), ((0, -1), 0)])
def test_the_tightest_is_the_smallest_limited(values, expected):
    assert tightest(*values) == expected


class TestDrawIndex:
    def test_is_a_pure_function(self):
        drawn = [draw_index(0, step, [0.25] * 4) for step in range(12)]
        assert drawn == [draw_index(0, step, [0.25] * 4) for step in range(12)]
        # written down once: another platform, Python or release must draw the same, or a resumed run differs
        assert drawn == EXPECTED_DRAWS
        assert drawn != [draw_index(1, step, [0.25] * 4) for step in range(12)]

    def test_leaves_the_global_generator_alone(self):
        before = random.getstate()
        draw_index(0, 5, [0.5, 0.5])
        assert random.getstate() == before
