# SPDX-License-Identifier: Apache-2.0
"""Contexts of the layers' own: what a layer attends to, which contexts it may have, and how they are saved.

Shapes: B batch, Q query frames, A attention frames (Q, and those of the cache before them), L layers.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.windows import Window

LayerContexts = tuple[AttContext | None, ...]
"""For each layer its own context; None for a layer without."""


class LayerAttentionMasks:
    """Stands in for the attention mask of a forward pass where layers differ in theirs.

    Args:
        masks: for each context that some layer attends to, its mask [B, A, A] bool, True = hidden, or without
            a cache a :class:`~nemo.collections.asr.parts.att_context.blockwise.BlockwiseMask`.
        effective: for each context of a layer's own (None: a layer without), the one it attends to.
    """

    def __init__(self, masks: Mapping[AttContext, torch.Tensor], effective: Mapping[AttContext | None, AttContext]):
        self.masks, self.effective = masks, effective

    def of(self, own: AttContext | None) -> torch.Tensor:
        """Return the mask of a layer with this context of its own, [B, Q, A] bool, True = hidden, or its stand-in."""
        return self.masks[self.effective[own]]

    def __getitem__(self, index) -> 'LayerAttentionMasks':
        """Slice every mask, as the encoder does when it has a cache."""
        return LayerAttentionMasks({context: mask[index] for context, mask in self.masks.items()}, self.effective)


def check_layer_context(
    own: AttContext, batches: Sequence[AttContext], within: Callable[[AttContext, AttContext, str], Window], where: str
) -> None:
    """Check that a layer can have this context, whichever of its contexts the batch has.

    Args:
        own: the layer's context; -1 narrows nothing on its side.
        batches: every context that a batch can have.
        within: returns what a layer sees, of a batch's context, its own, and ``where``; raises if it cannot be shown.
        where: what to name in an error: where ``own`` was found.

    Raises:
        ValueError: if its right context goes beyond every batch's, or the style cannot show the intersection.
    """
    rights = [batch.right for batch in batches]
    if UNLIMITED not in rights and own.right > max(rights):
        raise ValueError(
            f"{where}: the right context is {own.right}, beyond the batch's; it must be at most {max(rights)}, "
            f"that of att_context_size {[batch.as_list() for batch in batches]}, or -1 for it"
        )
    for batch in batches:
        within(batch, own, where)


def as_plain(contexts):
    """Return contexts, or a schedule of them, as a config holds them: lists, dicts and numbers."""
    if isinstance(contexts, AttContext):
        return contexts.as_list()
    if isinstance(contexts, dict):
        return {key: as_plain(value) for key, value in contexts.items()}
    return [as_plain(item) for item in contexts] if isinstance(contexts, (list, tuple)) else contexts


def as_tensor(*contexts: LayerContexts) -> torch.Tensor:
    """Return several sets of layers' contexts as int64 [N, L, 2]; -1, -1, which narrows nothing, where there is none."""
    return torch.tensor([[list(context or (UNLIMITED, UNLIMITED)) for context in layers] for layers in contexts])


def from_pairs(pairs) -> LayerContexts:
    """Return the layers' contexts of L pairs of numbers; None for -1, -1."""
    return tuple(None if max(pair) == UNLIMITED else AttContext(*pair) for pair in pairs)


def without_those_that_narrow_nothing(contexts: LayerContexts) -> LayerContexts:
    """Return the contexts as they come back from :func:`as_tensor`."""
    return from_pairs(as_tensor(contexts)[0].tolist())
