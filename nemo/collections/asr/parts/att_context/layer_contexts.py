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


class LayerContext:
    """The context of one layer: a place in the encoder's tuple, which the layer's attention reads and sets.

    Args:
        encoder: has ``layer_att_contexts`` and ``set_context_of_layer``.
        index: of the layer.
    """

    def __init__(self, encoder, index: int):
        self.encoder, self.index = encoder, index

    def get(self) -> AttContext | None:
        """Return the layer's own context; None: the batch's."""
        return self.encoder.layer_att_contexts()[self.index]

    def set(self, context: AttContext | None) -> None:
        """Give the layer a context of its own; raises ValueError if the encoder's attention cannot follow it."""
        self.encoder.set_context_of_layer(self.index, context)


class LayerAttentionMasks:
    """Stands in for the attention mask of a forward pass where layers differ in theirs.

    Args:
        masks: for each context that some layer attends to, its mask [B, Q, A] bool, True = hidden, or without
            a cache a :class:`~nemo.collections.asr.parts.att_context.blockwise.BlockwiseMask`.
        effective: for each layer the context that it attends to.
    """

    def __init__(self, masks: Mapping[AttContext, torch.Tensor], effective: Sequence[AttContext]):
        self.masks, self.effective = masks, effective

    def of(self, layer: int) -> torch.Tensor:
        """Return the mask of a layer, [B, Q, A] bool, True = hidden, or its stand-in."""
        return self.masks[self.effective[layer]]

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
