# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``conformer_modules.py``: a layer attends within its own context."""

import torch
from torch.utils.checkpoint import checkpoint

from nemo.collections.asr.parts.att_context.blockwise import LayerAttentionMasks
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class ConformerLayer(_up.ConformerLayer):
    """NeMo's Conformer layer; its attention and attention adapters see its own context only."""

    recomputes = False
    """Whether the backward pass computes the activations again instead of keeping them; the encoder sets it."""

    @property
    def self_attention(self):
        """The attention module, ``self_attn``."""
        return self.self_attn

    def forward(self, x, att_mask=None, *args, **kwargs):
        """Run the layer as NeMo does, with its own mask of :class:`LayerAttentionMasks` where layers differ."""
        if isinstance(att_mask, LayerAttentionMasks):
            att_mask = att_mask.masks[self.self_attn.index]
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, x, att_mask, *args, use_reentrant=False, **kwargs)
        return super().forward(x, att_mask, *args, **kwargs)
