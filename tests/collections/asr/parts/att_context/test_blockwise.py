# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from attention_windows import attended

from nemo.collections.asr.parts.att_context.blockwise import (
    HIDDEN,
    AttentionBlocks,
    BlockwiseMask,
    can_cut,
    parse_choice,
    wins_by_blocks,
)
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window

CONTEXTS = [
    ('regular', (1, 0)),
    ('regular', (0, 0)),
    ('regular', (5, 3)),
    ('regular', (40, 0)),
    ('regular', (0, 7)),
    ('chunked_limited', (6, 2)),
    ('chunked_limited', (9, 0)),
    ('chunked_limited', (0, 4)),
    ('chunked_limited', (40, 19)),
    ('chunked_limited', (3, 70)),
]

UNUSED = Window(AttContext(0, 0))


class TestAttentionBlocks:
    @pytest.mark.parametrize('style, context', CONTEXTS)
    @pytest.mark.parametrize('frames', [1, 2, 7, 24, 61])
    def test_windows_show_each_query_what_the_style_shows_it(self, style, context, frames):
        blocks = AttentionBlocks.cut(Window(AttContext(*context), style), frames)
        padding = torch.arange(frames) >= torch.tensor([[frames], [frames // 2]])
        number = torch.arange(1, frames + 1).view(1, frames, 1, 1).expand(2, -1, 1, 1)  # of a frame, from 1
        windows = blocks.windows_of(number)[:, 0, :, :, 0]  # [B, N, W], 0: no frame
        seen = torch.zeros(2, blocks.count * blocks.queries, frames + 1, dtype=torch.bool)
        shown = (~blocks.hidden(padding) * windows.unsqueeze(2)).flatten(1, 2)  # [B, N * C, W]
        seen.scatter_(2, shown, True)
        expected = attended(context, style, frames) & ~padding.unsqueeze(1)
        assert torch.equal(seen[:, :frames, 1:], expected)

    def test_windows_of_a_few_frames(self):
        blocks = AttentionBlocks(frames=5, queries=2, before=3, after=1, past=3, future=1, window=UNUSED)
        frames = torch.tensor([1.0, 2, 3, 4, 5]).view(1, 5, 1, 1).requires_grad_()
        windows = blocks.windows_of(frames)
        assert windows[0, 0, :, :, 0].tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 0, 0]]
        windows.sum().backward()
        assert frames.grad.flatten().tolist() == [2, 3, 3, 2, 2]

    def test_each_score_is_placed_at_its_distance(self):
        blocks = AttentionBlocks(frames=4, queries=2, before=2, after=1, past=2, future=1, window=UNUSED)
        scores = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [11, 12, 13, 14], [15, 16, 17, 18]])
        assert blocks.place(scores.view(1, 1, 4, 4))[0, 0].tolist() == [
            [[1, 2, 3, 4, 0], [0, 5, 6, 7, 8]],
            [[11, 12, 13, 14, 0], [0, 15, 16, 17, 18]],
        ]

    def test_a_window_of_chunks_leaves_distances_out_that_no_query_sees(self):
        blocks = AttentionBlocks(frames=4, queries=2, before=2, after=0, past=3, future=1, window=UNUSED)
        scores = torch.arange(1.0, 21).view(1, 1, 4, 5)  # distances 3, 2, 1, 0, -1
        assert blocks.place(scores)[0, 0, 0].tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]

    @pytest.mark.parametrize('style, context', CONTEXTS)
    def test_a_context_beyond_the_audio_costs_no_more_than_all_of_it(self, style, context):
        left, right = context
        chunk = right + 1
        vast = AttContext(left + 1000 * chunk, right if style == 'chunked_limited' else right + 1000)
        blocks = AttentionBlocks.cut(Window(vast, style), frames=20)
        assert blocks.before < 20 and blocks.after < 20 and max(blocks.past, blocks.future) <= 19


class TestBlockwiseMask:
    def test_its_bias(self):
        mask = BlockwiseMask(Window(AttContext(1, 0)), torch.tensor([[False, False, True]]))
        assert mask.bias[0, 0, 0, :3, :4].tolist() == [
            [HIDDEN, 0, HIDDEN, HIDDEN],  # keys: before the first, 0, 1, 2 (padding)
            [HIDDEN, 0, 0, HIDDEN],
            [HIDDEN, HIDDEN, 0, HIDDEN],
        ]


class TestChoice:
    def test_yaml_makes_booleans_of_on_and_off(self):
        choices = {'auto': 'auto', 'on': 'on', 'off': 'off', True: 'on', False: 'off'}
        assert [parse_choice(value) for value in choices] == list(choices.values())
        for bad in ('yes', None, 1, 'AUTO', ['on']):
            with pytest.raises(ValueError, match='encoder.blockwise_attention is .*; it must be one of auto, on'):
                parse_choice(bad)

    def test_unlimited_contexts_have_no_blocks(self):
        assert can_cut(AttContext(0, 0)) and can_cut(AttContext(40, 13))
        assert not any(can_cut(AttContext(*sides)) for sides in ((-1, 0), (40, -1), (-1, -1)))

    @pytest.mark.parametrize('positions, sdpa', itertools.product((True, False), (True, False)))
    def test_blocks_win_where_the_audio_is_long_for_the_context(self, positions, sdpa):
        wins = [
            [wins_by_blocks(Window(AttContext(left, 0)), frames, positions, sdpa) for frames in (60, 600, 6000)]
            for left in (10, 40, 160, 10000)
        ]
        assert wins[0][1] and wins[1][2] and wins[2][2]
        assert not wins[1][0] and not wins[2][0] and not any(wins[3])
        for row in wins:
            assert row == sorted(row)  # never again slower for longer audio
