# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
import itertools

import pytest
import torch
from attention_windows import attended

from nemo.collections.asr.parts.att_context import AttContext, LayerAttentionMasks, intersect_in_style

FRAMES = 24


class TestIntersectInStyle:
    @pytest.mark.unit
    @pytest.mark.parametrize('style', ['regular', 'chunked_limited'])
    def test_it_shows_nothing_that_either_hides_or_is_refused(self, style):
        sides = [AttContext(left, right) for left, right in itertools.product([-1, 0, 2, 4, 6, 8], [-1, 0, 1, 2, 3])]
        accepted = 0
        for batch, own in itertools.product(sides, sides):
            if style == 'chunked_limited' and batch.left > 0 and batch.right >= 0 and batch.left % (batch.right + 1):
                continue  # no context of this style
            try:
                both = intersect_in_style(batch, own, style, 'here')
            except ValueError as error:
                assert style == 'chunked_limited' and str(error).startswith('here: the ')
                continue
            accepted += 1
            seen = attended(both, style, FRAMES)
            assert not (seen & ~attended(batch, style, FRAMES)).any(), (batch, own, both)
            if style == 'regular' or own.right in (-1, batch.right):
                own = own if style == 'regular' or own.right >= 0 else AttContext(own.left, batch.right)
                assert torch.equal(seen, attended(batch, style, FRAMES) & attended(own, style, FRAMES)), (
                    batch,
                    own,
                    both,
                )
        assert accepted > 150

    @pytest.mark.unit
    @pytest.mark.parametrize(
        'batch, own, message',
        [
            ((8, 3), (6, 3), 'the left context is 6; .* multiple of the chunk, 4 frames'),
            ((8, 3), (6, 0), 'the left context is 6; .* multiple of the chunk, 4 frames'),
            ((8, 3), (4, 2), 'the right context is 2; .* divisor of the chunk, 4 frames'),
            ((8, -1), (4, 3), 'the right context is 3'),
            ((-1, -1), (6, 3), 'the left context is 6; .* multiple of the chunk, 4 frames'),
        ],
    )
    def test_what_chunks_cannot_show_is_refused(self, batch, own, message):
        with pytest.raises(ValueError, match=f'^here: {message}'):
            intersect_in_style(AttContext(*batch), AttContext(*own), 'chunked_limited', 'here')

    @pytest.mark.unit
    def test_smaller_chunks_within_the_batchs(self):
        both = intersect_in_style(AttContext(8, 3), AttContext(4, 1), 'chunked_limited', 'here')
        assert both == AttContext(4, 1)


class TestLayerAttentionMasks:
    @pytest.mark.unit
    def test_layers_that_see_the_same_share_a_mask_and_all_are_sliced(self):
        wide, narrow = AttContext(4, 0), AttContext(1, 0)
        tensors = {wide: torch.eye(4, dtype=torch.bool).expand(2, 4, 4), narrow: torch.ones(2, 4, 4).bool()}
        masks = LayerAttentionMasks(tensors, {None: wide, AttContext(8, 0): wide, narrow: narrow})[:, 3:]
        assert masks.of(None) is masks.of(AttContext(8, 0))
        assert torch.equal(masks.of(None), tensors[wide][:, 3:])
        assert torch.equal(masks.of(narrow), tensors[narrow][:, 3:])
