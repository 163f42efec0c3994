# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo.collections.asr.parts.att_context import AttContext
from nemo.collections.asr.parts.att_context.precedence import context_of_batch

DEFAULT, HAND, BATCH, DRAWN, CEILING = (AttContext(left, 0) for left in (10, 20, 30, 40, 5))


@pytest.mark.parametrize(
    'said, expected',
    [
        (dict(), DEFAULT),
        (dict(draw=DRAWN), DRAWN),
        (dict(with_batch=BATCH), BATCH),
        (dict(with_batch=BATCH, draw=DRAWN), BATCH),
        (dict(by_hand=HAND), HAND),
        (dict(by_hand=HAND, draw=DRAWN), HAND),
        (dict(by_hand=HAND, with_batch=BATCH), HAND),
        (dict(by_hand=HAND, with_batch=BATCH, draw=DRAWN), HAND),
    ],
    ids=lambda value: ', '.join(value) if isinstance(value, dict) else '',
)
def test_who_wins_and_a_ceiling_narrows_every_one(said, expected):
    draws = []
    draw = (lambda: draws.append(1) or said['draw']) if 'draw' in said else None
    assert context_of_batch(DEFAULT, **{**said, 'draw': draw}) == expected
    assert len(draws) == (expected == DRAWN)  # a draw that nobody needs does not count
    assert context_of_batch(DEFAULT, **{**said, 'draw': draw}, ceiling=CEILING) == CEILING
    assert context_of_batch(DEFAULT, **{**said, 'draw': draw}, ceiling=AttContext(100, 0)) == expected


def test_a_ceiling_that_the_style_cannot_show_is_refused_by_name():
    with pytest.raises(ValueError, match='^encoder.att_context_ceiling: the left context is 6; .* multiple of'):
        context_of_batch(AttContext(8, 3), ceiling=AttContext(6, 3), style='chunked_limited')
