# SPDX-License-Identifier: Apache-2.0
"""Contexts of the layers' own, in a forward pass.

Shapes: B batch, Q query frames, A attention frames (Q, and those of the cache before them).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo.collections.asr.parts.att_context.context import AttContext

LayerContexts = tuple[AttContext | None, ...]
"""For each layer its own context; None for a layer without."""


@dataclass(frozen=True)
class LayerContext:
    """The place of a layer's context, among the ``layer_att_contexts`` of an encoder."""

    encoder: Any
    index: int
    """Of the layer."""


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

    def __getitem__(self, index: Any) -> 'LayerAttentionMasks':
        """Slice every mask, as the encoder does when it has a cache."""
        return LayerAttentionMasks({context: mask[index] for context, mask in self.masks.items()}, self.effective)
