# SPDX-License-Identifier: Apache-2.0
"""The tokens that a model predicts, from clean features. Shapes as in ``base.py``."""

from typing import Any

import torch

from nemo.collections.asr.modules.ssl_modules.quantizers import without_autocast
from nemo.collections.asr.parts.preprocessing.features import standardize_per_feature
from nemo.collections.asr.parts.utils.config_keys import Model


class Targets:
    """Makes the tokens of an ``EncDecMaskedTokenPredModel`` by its quantizer.

    Features, normalisation and projection are float32 in any precision of the model, so the tokens are the same.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.normalize = model, Model.parse(model.cfg).target_normalize
        self.combine_time_steps: int = getattr(model.quantizer, 'combine_time_steps', 1)  # mask frames of one token

    def check(self) -> None:
        """Raise ValueError before training if the quantizer does not fit its features; see :class:`Objective`."""
        model = self.model
        if model.pre_encoder is not None and self.combine_time_steps != 1:
            raise ValueError(
                f"model.quantizer.combine_time_steps is {self.combine_time_steps} with mask_position post_conv; it must "
                "be 1, for the quantizer sees features after subsampling"
            )
        normalized = 'per_feature' in (self.normalize, model.cfg.preprocessor.get('normalize'))
        given = 'per_feature' if normalized else 'NA'
        needed = getattr(model.quantizer, 'projection_normalization', None)
        if needed not in (None, given):
            raise ValueError(
                f"model.target_normalize is {given!r}; model.quantizer.projection_file was computed from features "
                f"normalised by {needed!r}: set that, or compute it again with --target_normalize {given}"
            )

    @torch.no_grad()
    def of(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens [B, S] or [B, S, H] of clean features [B, D, T], and their lengths [B]."""
        if self.model.pre_encoder is not None:
            features, lengths = self._subsampled(features, lengths)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if self.normalize == 'per_feature':
            features = standardize_per_feature(features, lengths)
        whole = features.shape[-1] // self.combine_time_steps * self.combine_time_steps  # as stock's quantizer needs
        _, tokens = self.model.quantizer(input_signal=features[..., :whole])
        return tokens, torch.div(lengths, self.combine_time_steps, rounding_mode='floor')

    def _subsampled(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [B, D, T] after the subsampling, [B, d_model, A], and their lengths [B]."""
        subsampling = self.model.pre_encoder.pre_encode
        with without_autocast(features.device):
            features = features.transpose(1, 2).to(next(subsampling.parameters()).dtype)
            features, lengths = subsampling(x=features, lengths=lengths)
        return features.transpose(1, 2), lengths
