# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""What a layer with a context of its own attends to.

Shapes: B batch, Q query frames, A attention frames (Q, and those of the cache before them).
"""

from collections.abc import Mapping
from typing import Optional

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext

STYLES = ('regular', 'chunked_limited')  # those that layers' own contexts can follow


class LayerAttentionMasks:
    """Stands in for the attention mask of a forward pass where layers differ in theirs.

    Args:
        masks: for each context that some layer attends to, its mask [B, A, A] bool, True = hidden, or without
            a cache a :class:`~nemo.collections.asr.parts.att_context.blockwise.BlockwiseMask`.
        effective: for each context of a layer's own (None: a layer without), the one it attends to.
    """

    def __init__(self, masks: Mapping[AttContext, torch.Tensor], effective: Mapping[Optional[AttContext], AttContext]):
        self.masks, self.effective = masks, effective

    def of(self, own: Optional[AttContext]) -> torch.Tensor:
        """Return the mask of a layer with this context of its own, [B, Q, A] bool, True = hidden, or its stand-in."""
        return self.masks[self.effective[own]]

    def __getitem__(self, index) -> 'LayerAttentionMasks':
        """Slice every mask, as the encoder does when it has a cache."""
        return LayerAttentionMasks({context: mask[index] for context, mask in self.masks.items()}, self.effective)


def intersect_in_style(batch: AttContext, own: AttContext, style: str, where: str) -> AttContext:
    """Return the context of all that is visible in both.

    Under ``chunked_limited`` a frame sees its own chunk of right + 1 frames and left // (right + 1) chunks before it.
    So a left context must be whole chunks of the batch, and a smaller right context makes chunks that must lie within
    the batch's.

    Args:
        batch: the batch's context.
        own: a layer's, or a ceiling; -1 narrows nothing on its side.
        style: ``regular`` or ``chunked_limited``.
        where: what to name in an error: where ``own`` was found.

    Raises:
        ValueError: if no context of that style shows exactly what both show.
    """
    both = batch.intersect(own)
    if style == 'regular' or own == AttContext(UNLIMITED, UNLIMITED):
        return both
    chunk, own_chunk = batch.right + 1, both.right + 1  # 0: no chunks, the right context is unlimited
    if chunk and own.left > 0 and own.left % chunk:
        raise ValueError(
            f"{where}: the left context is {own.left}; with att_context_style chunked_limited it must be a multiple "
            f"of the chunk, {chunk} frames for att_context_size {batch.as_list()} (right context + 1)"
        )
    narrowed = both.right != batch.right
    if narrowed and (chunk % own_chunk if chunk else batch.left != UNLIMITED):
        raise ValueError(
            f"{where}: the right context is {own.right}; with att_context_style chunked_limited and att_context_size "
            f"{batch.as_list()} it must be -1 (the batch's), {batch.right}, or one less than a divisor of the chunk, "
            f"{chunk} frames"
        )
    if own_chunk and both.left > 0 and both.left % own_chunk:
        raise ValueError(
            f"{where}: the left context is {both.left}; with att_context_style chunked_limited it must be a multiple "
            f"of the chunk, {own_chunk} frames (right context + 1)"
        )
    return both
