# SPDX-License-Identifier: Apache-2.0
"""Masking as stock NeMo does it, in a model whose attention has a context: nothing tells it of that."""

import torch

from nemo.collections.asr.modules.ssl_modules.masking import RandomBlockMasking
from nemo.collections.asr.parts.att_context.context import UNLIMITED
from nemo.core.neural_types import LengthsType, NeuralType, SpectrogramType


class ContextFreeMasking(RandomBlockMasking):
    """Random blocks wherever they fall, answerable or not; the arguments are those of the parent class."""

    @property
    def input_types(self):
        """Returns definitions of module input types; stock's, without a context."""
        return {
            'input_feats': NeuralType(('B', 'D', 'T'), SpectrogramType()),
            'input_lengths': NeuralType(tuple('B'), LengthsType()),
        }

    @classmethod
    def of_model(cls, model) -> 'ContextFreeMasking':
        """Return such masking with the settings, and the mask embedding, of a model's own."""
        settings = {name: value for name, value in model.cfg.masking.items() if name != '_target_'}
        made = cls(**settings, subsampling_factor=model.mask_frames_per_attention_frame)
        made.load_state_dict(model.mask_processor.state_dict())
        return made.to(next(model.parameters()).device)

    def forward(self, input_feats: torch.Tensor, input_lengths: torch.Tensor):
        """Mask features [B, D, T] of lengths [B]; returns masked features and masks, [B, D, T], 1 where masked."""
        draw = self.forward_with_overlap if self.allow_overlap else self.forward_without_overlap
        return draw(input_feats, input_lengths, effective_left_context=UNLIMITED)
