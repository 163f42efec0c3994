# SPDX-License-Identifier: Apache-2.0
"""Block masking of endless streams: the state of what was drawn. New in this project.

The frames that are kept visible are on one grid from the beginning of a stream. Blocks begin and continue as in
``RandomBlockMasking``, on the frames between.

Shapes: B streams, N new mask frames, A attention frames.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.visible_frames import kept_visible_frames
from nemo.collections.asr.parts.att_context.windows import Window

FAR_END = 1 << 30  # attention frames: the end of a stream is not known


def kept_window(window: Window, causal: bool) -> Window | None:
    """Return the window in which masking keeps a frame visible; None where every frame may be masked.

    Without a limit to the past only ``causal`` keeps one: at the beginning, where the past is short.
    """
    left, right = window.context
    if left == UNLIMITED and not causal:
        return None
    return Window(AttContext(UNLIMITED, 0)) if left == right == UNLIMITED else window


class BlockChances(NamedTuple):
    """How blocks are drawn on the frames of a stream that are not kept visible."""

    block: int  # mask frames of a block
    probability: float  # that a frame begins a block; without overlap: that a slot of the grid is masked
    overlap: bool
    kept: Window | None  # in which a frame is kept visible; None: nowhere

    @classmethod
    def of(cls, mask_prob: float, block: int, overlap: bool, most: float, kept: Window | None) -> 'BlockChances':
        """Make up for the frames kept visible, so that the share, of ``most``, is that of long utterances."""
        if kept is not None and not kept.has_chunks and kept.context.left != 0:
            kept = Window(AttContext(kept.context.left, 0))  # no frame after the end of a stream is visible
        free = 1 - (0.0 if kept is None else 1 / kept.frames)  # one is kept visible in each window
        share = min(1 - (1 - mask_prob) ** block if overlap else mask_prob, most)
        probability = min(share / free, 1.0) if free > 0 else 0.0
        if overlap:
            probability = 1 - (1 - probability) ** (1 / block)
        return cls(block, probability, overlap, kept)


@dataclass
class MaskedTimeLine:
    """The state of masking for streams, one row for each; :meth:`draw` changes it."""

    phase: torch.Tensor  # where the kept frames are, from 0 to 1; [B, 1] float32
    received: torch.Tensor  # mask frames, [B, 1] int64
    free: torch.Tensor  # those not kept visible, from a random number on: the offset of the grid; [B, 1] int64
    masked_up_to: torch.Tensor  # count of free frames that the last block goes up to, [B, 1] int64

    @classmethod
    def new(cls, streams: int, block: int, device=None) -> 'MaskedTimeLine':
        """Return the state of B streams before the first frame, for blocks of so many mask frames."""
        offset = (torch.rand(streams, 1, device=device) * block).long()
        return cls(torch.rand_like(offset, dtype=torch.float32), offset * 0, offset, offset * 0)

    def draw(self, new: int, chances: BlockChances, factor: int) -> torch.Tensor:
        """Draw masks of new frames of streams, [B, N] bool; ``factor`` mask frames per attention frame."""
        place = self.received + torch.arange(new, device=self.received.device)
        allowed = self._may_be_masked(place.div(factor, rounding_mode='floor'), chances.kept)
        rank = self.free + allowed.cumsum(dim=1)  # from 1 on
        begins = allowed & (torch.rand(rank.shape, device=rank.device) < chances.probability)
        if not chances.overlap:
            begins &= (rank - 1) % chances.block == 0  # at a slot of the grid
        up_to = torch.where(begins, rank - 1 + chances.block, self.masked_up_to).cummax(dim=1).values
        self.received = self.received + new
        if new:
            self.free, self.masked_up_to = rank[:, -1:], up_to[:, -1:]
        return allowed & (rank <= up_to)

    def _may_be_masked(self, index: torch.Tensor, window: Window | None) -> torch.Tensor:
        """Return which frames, whose attention frames are given [B, N], may be masked."""
        if window is None:
            return torch.ones_like(index, dtype=torch.bool)
        phase = self.phase
        if window.has_chunks:  # the first frame of a chunk is there in the last, short one, too
            windows = 1 if window.context.left == UNLIMITED else window.context.left // window.chunk + 1
            phase = ((phase * windows).floor() + 0.5 / window.chunk) / windows
        return ~kept_visible_frames(window, index, torch.full_like(self.received, FAR_END), phase)
