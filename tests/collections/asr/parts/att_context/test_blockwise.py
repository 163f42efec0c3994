# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from attention_windows import attended

from nemo.collections.asr.parts.att_context.blockwise import (
    AttentionBlocks,
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

    @pytest.mark.parametrize('style, context', CONTEXTS)
    def test_a_context_beyond_the_audio_costs_no_more_than_all_of_it(self, style, context):
        left, right = context
        chunk = right + 1
        vast = AttContext(left + 1000 * chunk, right if style == 'chunked_limited' else right + 1000)
        blocks = AttentionBlocks.cut(Window(vast, style), frames=20)
        assert blocks.before < 20 and blocks.after < 20 and max(blocks.past, blocks.future) <= 19


class TestChoice:
    def test_yaml_makes_booleans_of_on_and_off(self):
        choices = {'auto': 'auto', 'on': 'on', 'off': 'off', True: 'on', False: 'off'}
        assert [parse_choice(value) for value in choices] == list(choices.values())
        for bad in ('yes', None, 1, 'AUTO', ['on']):
            with pytest.raises(ValueError, match='encoder.blockwise_attention is .*; it must be one of auto, on'):
                parse_choice(bad)

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
