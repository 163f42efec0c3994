# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``multi_softmax_decoder.py``: logits laid out for the softmax over classes.

Shapes: B batch, D features, T frames, C classes, H codebooks.
"""

import torch
import torch.nn.functional as F

from nemo.core import typecheck
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class MultiSoftmaxDecoder(_up.MultiSoftmaxDecoder):
    """NeMo's linear decoder; arguments, weights and results are NeMo's, but for half precision.

    NeMo's convolution leaves the classes of a frame T elements apart for the softmax; a linear layer, side by side.
    """

    @typecheck()
    def forward(self, encoder_output):
        """Return log-probabilities, at least float32, [B, T, C, H] or, squeezed, [B, T, C].

        Args:
            encoder_output: [B, D, T], any floating dtype.
        """
        layer = self.decoder_layers[0]
        # A wrapper, such as FSDP's, is of another type, or has hooks.
        plain = type(layer) is torch.nn.Conv1d and len(self.decoder_layers) == 1 and layer.kernel_size == (1,)
        if not plain or layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks:
            return super().forward(encoder_output=encoder_output)
        logits = F.linear(encoder_output.transpose(1, 2), layer.weight.squeeze(2), layer.bias)
        if not (self.squeeze_single and self.num_decoders == 1):
            logits = logits.unflatten(2, (self.num_classes, self.num_decoders))
        return F.log_softmax(logits, dim=2, dtype=torch.promote_types(logits.dtype, torch.float32))
