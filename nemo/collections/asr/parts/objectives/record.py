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

    clean: Frames  # features [B, D, T] and lengths [B] that the targets come from
    seen: Frames  # those that are masked and encoded; the same object where there is no noise
    targets: Frames | None = None  # tokens [B, S] or [B, S, H] and their lengths [B]


class BatchRecord(NamedTuple):
    """One forward pass of a model, for losses and reports; lengths are [B]."""

    encoded: torch.Tensor | None  # [B, d_model, A]; None in a record that is kept, for it would keep the graph alive
    encoded_lengths: torch.Tensor
    masks: torch.Tensor  # [B, D, M], 1 where masked
    mask_lengths: torch.Tensor
    tokens: torch.Tensor  # the targets, [B, S] or [B, S, H]
    token_lengths: torch.Tensor
    features: torch.Tensor  # the clean ones, [B, D, T]
    feature_lengths: torch.Tensor
    factor: int  # mask frames per attention frame
    threshold: float  # share of an attention frame's mask frames above which it counts as masked
    decoder_offset: int  # leading decoder frames that the loss of masked tokens drops

    def masked_share(self) -> torch.Tensor:
        """Return the masked share of each attention frame, [B, M // factor] float32."""
        return masked_share_per_frame(self.masks, self.factor)
