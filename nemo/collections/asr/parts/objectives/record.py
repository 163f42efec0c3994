# SPDX-License-Identifier: Apache-2.0
"""The features of a batch, and what one forward pass made of them.

Shapes: B batch, D features, T feature frames, A attention frames, M mask frames (T or A, by mask position), S target
frames, H codebooks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from nemo.collections.asr.parts.att_context.visible_frames import masked_share_per_frame

Frames = tuple[torch.Tensor, torch.Tensor]


@dataclass
class BatchInputs:
    """The features of a batch, and their targets as soon as one pass has made them, for passes in several contexts."""

    clean: Frames
    """Features [B, D, T] and lengths [B] that the targets come from."""
    seen: Frames
    """Those that are masked and encoded; the same object as ``clean`` where there is no noise."""
    targets: Frames | None = None
    """Tokens [B, S] or [B, S, H] and their lengths [B]."""


class BatchRecord(NamedTuple):
    """One forward pass of a model, for losses and reports."""

    encoded: torch.Tensor | None
    """The encoder's output, [B, d_model, A]; None in a record that is kept."""
    encoded_lengths: torch.Tensor
    """[B], in decoder frames."""
    masks: torch.Tensor
    """[B, D, M], 1 where masked."""
    mask_lengths: torch.Tensor
    """[B], in mask frames."""
    tokens: torch.Tensor
    """The targets, [B, S] or [B, S, H]."""
    token_lengths: torch.Tensor
    """[B]."""
    features: torch.Tensor
    """The clean features, [B, D, T]."""
    feature_lengths: torch.Tensor
    """[B]."""
    factor: int
    """Mask frames per attention frame."""
    threshold: float
    """Share of an attention frame's mask frames above which it counts as masked."""
    decoder_offset: int
    """Leading decoder frames that the loss of masked tokens drops."""

    def masked_share(self) -> torch.Tensor:
        """Return the masked share of each attention frame, [B, M // factor] float32."""
        return masked_share_per_frame(self.masks, self.factor)

    def to_keep(self) -> 'BatchRecord':
        """Return the record without the encoder's output, which would keep the graph alive."""
        return self._replace(encoded=None)
