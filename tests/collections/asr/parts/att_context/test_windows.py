# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from attention_windows import attended

from nemo.collections.asr.parts.att_context import AttContext
from nemo.collections.asr.parts.att_context.windows import STYLES, Window, tightest_window

FRAMES = 24
CONTEXTS = [*itertools.product([-1, 0, 2, 4, 8], [-1, 0, 1, 3])]


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('context', CONTEXTS)
def test_a_window_shows_what_the_attention_does(context, style):
    window, frames = Window(AttContext(*context), style), torch.arange(FRAMES)
    expected = attended(context, style, FRAMES)
    assert torch.equal(window.sees(frames.unsqueeze(1), frames.unsqueeze(0)), expected)
    first, last = window.bounds(frames)
    for frame, row in enumerate(expected):
        seen = row.nonzero().flatten()
        assert (max(int(first[frame]), 0), min(int(last[frame]), FRAMES - 1)) == (seen[0], seen[-1])
        assert window.bounds(frame) == (first[frame], last[frame]) and window.sees(frame, int(seen[0]))
    assert window.sees_other_frames == bool((expected & ~torch.eye(FRAMES, dtype=torch.bool)).any())


@pytest.mark.parametrize(
    'context, style, chunk, has_chunks',
    [
        ((4, 1), 'regular', 1, False),
        ((4, 1), 'chunked_limited', 2, True),
        ((4, 0), 'chunked_limited', 1, True),
        ((4, -1), 'chunked_limited', 1, False),
    ],
)
def test_a_chunk_is_what_shares_a_window(context, style, chunk, has_chunks):
    window = Window(AttContext(*context), style)
    assert (window.chunk, window.has_chunks) == (chunk, has_chunks)
    rows = attended(context, style, FRAMES)[8 : 8 + chunk]  # the first chunk from frame 8 on
    assert all(torch.equal(row, rows[0]) for row in rows)


class TestIntersectInStyle:
    @pytest.mark.parametrize('style', ['regular', 'chunked_limited'])
    def test_it_shows_nothing_that_either_hides_or_is_refused(self, style):
        sides = [AttContext(left, right) for left, right in itertools.product([-1, 0, 2, 4, 6, 8], [-1, 0, 1, 2, 3])]
        accepted = 0
        for batch, own in itertools.product(sides, sides):
            if style == 'chunked_limited' and batch.left > 0 and batch.right >= 0 and batch.left % (batch.right + 1):
                continue  # no context of this style
            try:
                both = Window(batch, style).intersect(own, 'here').context
            except ValueError as error:
                assert style == 'chunked_limited' and str(error).startswith('here: the ')
                continue
            accepted += 1
            seen = attended(both, style, FRAMES)
            assert not (seen & ~attended(batch, style, FRAMES)).any(), (batch, own, both)
            if style == 'regular' or own.right in (-1, batch.right):
                own = own if style == 'regular' or own.right >= 0 else AttContext(own.left, batch.right)
                assert torch.equal(seen, attended(batch, style, FRAMES) & attended(own, style, FRAMES)), (batch, own)
        assert accepted > 150

    def test_smaller_chunks_and_whole_ones(self):
        window = Window(AttContext(8, 3), 'chunked_limited')
        assert window.intersect(AttContext(4, 1), 'here').context == AttContext(4, 1)
        assert Window(AttContext(11, 3), 'chunked_limited').in_whole_chunks() == window


@pytest.mark.parametrize(
    'style, contexts, expected',
    [
        ('regular', [(8, 3), (4, -1)], (4, 3)),
        ('regular', [(0, 3), (5, 0)], (0, 3)),  # nothing in common: the smallest, or all would be kept visible
        ('chunked_limited', [(28, 13), (40, 6), (0, 0)], (28, 6)),
        ('chunked_limited', [(0, 13), (28, 0)], (0, 13)),
        ('chunked_limited', [(0, 0)], (0, 0)),
    ],
)
def test_the_tightest_window_lies_within_all_that_see_others_as_far_as_there_is_one(style, contexts, expected):
    found = tightest_window(Window(AttContext(*context), style) for context in contexts)
    assert found == Window(AttContext(*expected), style)
