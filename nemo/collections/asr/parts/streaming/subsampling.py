# SPDX-License-Identifier: Apache-2.0
"""Causal subsampling of many live streams; each convolution keeps the row that its next output needs.

A convolution of 3 frames in steps of 2 sees, for its frame i, the frames 2 * i - 2 ... 2 * i: two of them are new to each
output, one is the last of the step before. So encoder frame i takes the feature frames factor * (i - 1) + 1 ... factor * i.
Frames outside of a stream are zero before each convolution, as offline. Channels are last: mixing them is a matrix product.

Shapes: R rows (streams), Q encoder frames, T frames of a stage, F its frequencies, C channels, D the encoder's width.
"""

from itertools import repeat
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo.collections.asr.parts.streaming.linear import PreparedLinear, linear_in
from nemo.collections.asr.parts.streaming.ring_buffers import Rows, Stage

KERNEL, STRIDE = 3, 2
BLOCK = 16  # rows whose intermediate results stay in the processor's cache
SMALL = 1 << 15  # inputs of a convolution for which its set-up takes longer than a sum of products


class _Convolution:
    """A 3 x 3 convolution in steps of 2, over all channels or separable, and its activation."""

    def __init__(self, convolution: nn.Conv2d, pointwise: nn.Conv2d | None, activation: nn.Module):
        self.channels, relu = convolution.out_channels, isinstance(activation, nn.ReLU)
        self._weight, self._activation = None, None if relu else activation
        if pointwise is None:  # inputs in the order frame, frequency, channel
            self._mixed = PreparedLinear(convolution.weight.permute(0, 2, 3, 1), convolution.bias, relu=relu)
            return
        self._mixed = PreparedLinear(pointwise.weight, pointwise.bias, relu=relu)
        self._bias = None if convolution.bias is None else convolution.bias.detach().clone()
        self._weight = weight = convolution.weight.detach().clone(memory_format=torch.channels_last)
        sums = weight.device.type == 'cpu' and weight.dtype == torch.float32
        self._taps = weight.permute(2, 3, 0, 1).reshape(KERNEL, KERNEL, 1, 1, -1) if sums else None

    def __call__(self, frames: Tensor) -> Tensor:
        """Return [R, T, F', C'] for frames [R, 2 * T + 1, F, C] of which the first is cached."""
        if self._weight is None:
            inputs = _patches(frames).permute(0, 1, 2, 4, 5, 3).flatten(3)
        elif self._taps is not None and frames.numel() <= SMALL:
            inputs = (_patches(frames).permute(0, 4, 5, 1, 2, 3) * self._taps).flatten(1, 2).sum(1)
            inputs = inputs if self._bias is None else inputs.add_(self._bias)
        else:  # with one frequency too many where there are odd ones: to pad one side alone is a copy
            channels_first, padding = frames.permute(0, 3, 1, 2), (0, KERNEL - 1)
            convolved = F.conv2d(channels_first, self._weight, self._bias, STRIDE, padding, groups=self.channels)
            inputs = convolved.permute(0, 2, 3, 1)
        outputs = self._mixed(inputs.reshape(-1, inputs.shape[3])).view(*inputs.shape[:3], -1)
        outputs = outputs if self._activation is None else self._activation(outputs)
        return outputs[:, :, : frames.shape[2] // STRIDE + 1]


class IncrementalSubsampling:
    """A causal ``ConvSubsampling`` (``dw_striding``, ``striding``) by frame, with a copy of its weights, ``out`` in a precision."""

    def __init__(self, subsampling: nn.Module, precision: str = 'float32'):
        self.stages, pending = list[_Convolution](), list[nn.Module]()
        for layer in subsampling.conv:
            pending.append(layer)
            if not isinstance(layer, nn.Conv2d):
                self.stages.append(_Convolution(pending[0], pending[1] if len(pending) > 2 else None, layer))
                pending = []
        self.factor, self.features = subsampling.subsampling_factor, subsampling._feat_in
        weight = subsampling.out.weight.detach()
        # ours have frequency before channel
        by_frequency = weight.view(len(weight), self.stages[-1].channels, -1).transpose(1, 2)
        self.out = linear_in(precision, by_frequency.flatten(1), subsampling.out.bias)
        self.dtype, self.device = weight.dtype, weight.device

    def new_stage(self, batch: int) -> Stage:
        """Return the state of streams: the last row before each convolution, [B, 1, F, C], and frames [B]."""
        width, channels, caches = self.features, 1, []
        for stage in self.stages:
            caches.append(torch.zeros(batch, 1, width, channels, dtype=self.dtype, device=self.device))
            width, channels = width // STRIDE + 1, stage.channels
        return Stage(caches=caches, count=np.zeros(batch, np.int64))

    def step(self, caches: list[Any], features: Any, rows: Rows, begins: Any = None, left: Any = None) -> Tensor:
        """Return the next encoder frames of some rows, [R, Q, D], for their features [R, factor * Q, F].

        ``caches`` of :meth:`new_stage` change in place. ``begins`` [R] bool: the first frame is its stream's first; what is
        before it counts as zeros. ``left`` [R] int64, where streams end: how many of the features exist; later ones count as
        zeros. A stream without any begins, and has factor - 1 left: those before it.
        """
        size = BLOCK if features.device.type == 'cpu' else max(len(features), 1)
        own = [rows.borrow(cache) for cache in caches]
        split = zip(*(cache.split(size) for cache in own))
        began, remain = (repeat(None) if values is None else values.split(size) for values in (begins, left))
        parts = [*map(self._step, split, features.split(size), began, remain)]
        for cache, new in zip(caches, own, strict=True):
            rows.store(cache, new)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _step(self, caches: Any, features: Any, begins: Any, left: Any) -> Tensor:
        frames, ahead = features.unsqueeze(-1), self.factor
        for stage, cache in zip(self.stages, caches, strict=True):
            frames = torch.cat((cache, frames), dim=1)
            if begins is not None:
                frames[:, :ahead].masked_fill_(begins[:, None, None, None], 0.0)
            if left is not None:
                behind = torch.arange(frames.shape[1], device=left.device) > left[:, None]
                frames.masked_fill_(behind[:, :, None, None], 0.0)
                left = torch.div(left + 1, STRIDE, rounding_mode='floor')
            cache.copy_(frames[:, -1:])
            frames = stage(frames)
            ahead //= STRIDE
        return self.out(frames.flatten(2).flatten(0, 1)).view(len(frames), frames.shape[1], -1)


def _patches(frames: Tensor) -> Tensor:
    """Return what each output of a convolution sees, [R, T, F', C, 3, 3], of frames [R, 2 * T + 1, F, C]."""
    padded = torch.constant_pad_nd(frames, (0, 0, KERNEL - 1, STRIDE - 1))
    return padded.unfold(1, KERNEL, STRIDE).unfold(2, KERNEL, STRIDE)
