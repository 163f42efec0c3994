# SPDX-License-Identifier: Apache-2.0
"""What a forward pass encoded, masked and aimed at, for those who report on it.

Shapes: B batch, D features, T feature frames, A attention frames, M mask frames (T or A, by mask position), S target
frames, H codebooks.
"""

from typing import NamedTuple

import torch

from nemo.collections.asr.parts.att_context.answerability import masked_share_per_frame


class BatchRecord(NamedTuple):
    """One forward pass of a model of masked token prediction; it is returned, and handed to the reports."""

    encoded: torch.Tensor | None
    """What the encoder made, [B, d_model, A]; None in a record that is kept."""
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
    """Leading decoder frames that the loss drops."""
    next_token_offset: int | None = None
    """Tokens between a frame's own and the first next one that it is asked for; None: it is not asked."""

    next_token_chunk: int = 1
    """Frames of a chunk at whose end next tokens are predicted; 1: every frame predicts."""

    def masked_share(self) -> torch.Tensor:
        """Return the masked share of each attention frame, [B, M // factor] float32."""
        return masked_share_per_frame(self.masks, self.factor)

    def to_keep(self) -> 'BatchRecord':
        """Return the record without what the encoder made, which would keep the whole graph alive."""
        return self._replace(encoded=None)
