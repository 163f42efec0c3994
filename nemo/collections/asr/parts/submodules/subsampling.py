# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``subsampling.py``: masks the padding once for each convolution, in place.

Shapes: B batch, C channels, T frames, D features.
"""

import torch
from torch import nn

from nemo_streaming_ssl import upstream

_up = upstream(globals())

KEEP_ZERO = (nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.LeakyReLU, nn.ELU)  # activations of 0 at 0


class MaskedConvSequential(_up.MaskedConvSequential):
    """NeMo's convolutions and activations, between which padding is set to zero; results are NeMo's.

    NeMo multiplies by the mask before each layer, and keeps the products for the backward pass. Only a convolution over
    several frames carries padding into others: its input alone is masked, in place; activations keep its zeros.
    """

    def forward(self, x, lengths):
        """From features [B, T, D], lengths [B] to [B, C, T', D'], zeros in the padding, lengths [B] int64."""
        layers = list(self)
        if not all(isinstance(layer, (nn.Conv2d, *KEEP_ZERO)) for layer in layers):
            return super().forward(x, lengths)
        lengths = lengths.float()
        x = x.unsqueeze(1)
        x = x * _time_mask(x, lengths)
        for layer, following in zip(layers, [*layers[1:], None]):
            x = layer(x)
            if not isinstance(layer, nn.Conv2d):
                continue
            if layer.stride != (1, 1):
                before, after = layer.padding
                padding = getattr(layer, '_left_padding', before), getattr(layer, '_right_padding', after)
                lengths = _up.calculate_conv_output_size(lengths, layer.kernel_size[0], layer.stride[0], padding)
            if not isinstance(following, nn.Conv2d) or following.kernel_size != (1, 1) or following.stride != (1, 1):
                x = x.mul_(_time_mask(x, lengths))
        return x, lengths.long()


def _time_mask(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return 1 at valid frames, 0 at padding, for x [B, C, T, D]; [B, 1, T, 1] in its dtype."""
    valid = torch.arange(x.shape[2], device=x.device) < lengths.long().unsqueeze(1)
    return valid[:, None, :, None].to(x.dtype)


_up.MaskedConvSequential = MaskedConvSequential  # NeMo's ConvSubsampling looks it up in its own module
