# SPDX-License-Identifier: Apache-2.0
"""The tokens that a model predicts, from clean features. Shapes as in ``base.py``."""

from collections.abc import Callable
from typing import Any

import torch

from nemo.collections.asr.modules.ssl_modules.quantizers import without_autocast
from nemo.collections.asr.parts.preprocessing.features import standardize_per_feature
from nemo.collections.asr.parts.utils.config_keys import Model

Convert = Callable[[torch.Tensor], torch.Tensor]


class Targets:
    """Makes the tokens of an ``EncDecMaskedTokenPredModel`` by its quantizer.

    Features, normalisation and projection are float32 in any precision of the model, so the tokens are the same.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.normalize = model, Model.parse(model.cfg).target_normalize
        self.combine_time_steps: int = getattr(model.quantizer, 'combine_time_steps', 1)  # mask frames of one token

    def check(self) -> None:
        """Raise ValueError before training if the quantizer does not fit its features; see :class:`Objective`."""
        model, quantizer = self.model, self.model.quantizer
        if model.pre_encoder is not None and self.combine_time_steps != 1:
            raise ValueError(
                f"model.quantizer.combine_time_steps is {self.combine_time_steps} with mask_position post_conv; it must "
                "be 1, for the quantizer sees features after subsampling"
            )
        if getattr(quantizer, 'projection', 'random') == 'random':
            return
        if model.pre_encoder is not None:
            raise ValueError(
                "model.quantizer.projection is 'pca' with mask_position post_conv; it must be random: the quantizer then "
                "sees features after a subsampling that is learned, whose principal components are not known beforehand"
            )
        normalized = 'per_feature' in (self.normalize, model.cfg.preprocessor.get('normalize'))
        given, needed = 'per_feature' if normalized else 'NA', quantizer.projection_normalization
        if needed not in (None, given):
            raise ValueError(
                f"model.target_normalize is {given!r}; model.quantizer.projection_file was computed from features "
                f"normalised by {needed!r}: set that, or compute it again with --target_normalize {given}"
            )

    @torch.no_grad()
    def of(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens [B, S] or [B, S, H] of features [B, D, M], and their lengths [B]."""
        quantizer, features = self.model.quantizer, features.to(torch.promote_types(features.dtype, torch.float32))
        if self.normalize == 'per_feature':
            features = standardize_per_feature(features, lengths)
        whole = features.shape[-1] // self.combine_time_steps * self.combine_time_steps  # as stock's quantizer needs
        features = features[..., :whole]
        _, tokens = quantizer(input_signal=features)
        return tokens, torch.div(lengths, self.combine_time_steps, rounding_mode='floor')

    @torch.no_grad()
    def subsampled(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return clean features [B, D, T] after the subsampling, [B, d_model, A], and their lengths [B]."""
        subsampling = self.model.pre_encoder.pre_encode
        with without_autocast(features.device):
            weight = next(subsampling.parameters())
            features, lengths = subsampling(x=features.transpose(1, 2).to(weight.dtype), lengths=lengths)
        return features.transpose(1, 2), lengths


def keeping_full_precision(convert: Convert, *modules: torch.nn.Module) -> Convert:
    """Change a conversion of tensors for ``Module._apply``: some modules do not become half precision."""
    kept = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}

    def convert_others(tensor: torch.Tensor) -> torch.Tensor:
        converted = convert(tensor)
        to_half = id(tensor) in kept and converted.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(converted.device) if to_half else converted

    return convert_others
