# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Causal subsampling of many live streams at once; each convolution keeps the row that its next output needs.

A convolution of 3 frames in steps of 2 sees, for its frame i, the frames 2 * i - 2 ... 2 * i before it: two of them are new
to each output, one is the last of the step before. So encoder frame i takes the feature frames factor * (i - 1) + 1 ...
factor * i, and no frame is computed twice. Frames before a stream's first, and behind its last, are zero before each
convolution, as offline has them. Channels are last in memory, so that convolutions are matrix products.

Shapes: R rows (streams), Q encoder frames, T frames of a stage, F its frequencies, C channels, D the encoder's width.
"""

from typing import Optional

import torch
from torch import nn

from nemo.collections.asr.parts.streaming.linear import PreparedLinear

KERNEL, STRIDE = 3, 2
BLOCK = 16  # rows whose intermediate results stay in the processor's cache
SMALL = 1 << 16  # numbers that are faster added up at once than place by place


class _Stage:
    """One convolution of 3 x 3 in steps of 2, and what follows it up to the activation.

    Args:
        convolution: over one channel, over all of them, or over each by itself.
        pointwise: the mixture of channels behind the last kind; else None.
    """

    def __init__(self, convolution: nn.Conv2d, pointwise: Optional[nn.Conv2d]):
        weight = convolution.weight.detach()
        self.channels = weight.shape[0]
        self.depthwise = None
        if convolution.groups == 1:  # inputs in the order frame, frequency, channel
            self.mixed = PreparedLinear(weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)
            return
        self.depthwise = weight[:, 0].permute(1, 2, 0).flatten(0, 1).contiguous()  # [9, C]
        bias = convolution.bias
        self.bias = torch.zeros_like(self.depthwise[0]) if bias is None else bias.detach()
        self.mixed = PreparedLinear(pointwise.weight.flatten(1), pointwise.bias)

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Return [R, T, F', C'] before the activation, for frames [R, 2 * T + 1, F, C] of which the first is cached."""
        frames = torch.constant_pad_nd(frames, (0, 0, KERNEL - 1, STRIDE - 1))
        rows, count, width, _ = frames.shape
        count, width = (count - KERNEL) // STRIDE + 1, (width - KERNEL) // STRIDE + 1
        if self.depthwise is None:
            patches = frames.unfold(1, KERNEL, STRIDE).unfold(2, KERNEL, STRIDE).permute(0, 1, 2, 4, 5, 3)
            return self.mixed(patches.reshape(rows * count * width, -1)).view(rows, count, width, -1)
        if rows * count * width * self.channels <= SMALL:
            patches = frames.unfold(1, KERNEL, STRIDE).unfold(2, KERNEL, STRIDE).permute(0, 4, 5, 1, 2, 3)
            mixed = (patches * self.depthwise.view(KERNEL, KERNEL, 1, 1, -1)).flatten(1, 2).sum(1).add_(self.bias)
            return self.mixed(mixed.view(-1, self.channels)).view(rows, count, width, -1)
        last = STRIDE * count - 1, STRIDE * width - 1
        mixed = None
        for place, weight in enumerate(self.depthwise):
            time, frequency = divmod(place, KERNEL)
            tap = frames[:, time : time + last[0] : STRIDE, frequency : frequency + last[1] : STRIDE]
            mixed = torch.addcmul(self.bias, tap, weight) if mixed is None else mixed.addcmul_(tap, weight)
        return self.mixed(mixed.flatten(0, 2)).view(rows, count, width, -1)


class IncrementalSubsampling:
    """NeMo's ``dw_striding`` and ``striding`` subsampling, frame by frame; weights are those of the moment it is made.

    Args:
        subsampling: a causal ``ConvSubsampling``.
    """

    def __init__(self, subsampling: nn.Module):
        layers = [layer for layer in subsampling.conv if isinstance(layer, nn.Conv2d)]
        self.activations = [layer for layer in subsampling.conv if not isinstance(layer, nn.Conv2d)]
        self.stages = []
        for layer, following in zip(layers, [*layers[1:], None]):
            if layer.stride != (1, 1):
                mixes = following is not None and following.stride == (1, 1)
                self.stages.append(_Stage(layer, following if mixes else None))
        self.factor, self.features = subsampling.subsampling_factor, subsampling._feat_in
        weight = subsampling.out.weight.detach()
        channels = self.stages[-1].channels
        weight = (
            weight.view(len(weight), channels, -1).transpose(1, 2).flatten(1)
        )  # ours have frequency before channel
        self.out = PreparedLinear(weight, subsampling.out.bias)
        self.dtype, self.device = weight.dtype, weight.device

    def new_caches(self, batch: int) -> list[torch.Tensor]:
        """Return the last row before each stage, of streams that begin, [B, 1, F, C] each."""
        width, channels, caches = self.features, 1, []
        for stage in self.stages:
            caches.append(torch.zeros(batch, 1, width, channels, dtype=self.dtype, device=self.device))
            width, channels = width // STRIDE + 1, stage.channels
        return caches

    def step(
        self,
        caches: list[torch.Tensor],
        features: torch.Tensor,
        rows: Optional[torch.Tensor],
        begins: Optional[torch.Tensor] = None,
        left: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Return the next encoder frames of some rows, [R, Q, D].

        Args:
            caches: of :meth:`new_caches`; change in place.
            features: [R, factor * Q, F], those that these frames take; 0 before the first and behind the last.
            rows: which rows of the caches these are, [R]; None: all.
            begins: whether a row's first frame is the first of its stream, [R] bool; None: none is.
            left: of how many of the features there are any, [R] int64, where streams end; None: of all.
        """
        count = features.shape[0]
        if count <= BLOCK or begins is not None or left is not None:
            return self._step(caches, features, slice(0, count) if rows is None else rows, begins, left)
        parts = []
        for start in range(0, count, BLOCK):
            part = slice(start, min(start + BLOCK, count))
            parts.append(self._step(caches, features[part], part if rows is None else rows[part], None, None))
        return torch.cat(parts)

    def _step(self, caches, features, rows, begins, left) -> torch.Tensor:
        frames = features.unsqueeze(-1)
        ahead = self.factor
        for index, (stage, cache, activation) in enumerate(zip(self.stages, caches, self.activations)):
            joined = torch.cat((cache[rows], frames), dim=1)
            cache[rows] = frames[:, -1:]
            frames = activation(stage(joined))
            ahead //= STRIDE
            if index + 1 < len(self.stages):
                if begins is not None and ahead > 1:  # before the stream's first: the activation of a bias is not 0
                    frames[:, : ahead - 1].mul_(~begins[:, None, None, None])
                if left is not None:
                    left = torch.div(left + 1, STRIDE, rounding_mode='floor')
                    there = torch.arange(frames.shape[1], device=left.device) < left[:, None]
                    frames = frames * there[:, :, None, None]
        return self.out(frames.flatten(2).flatten(0, 1)).view(len(frames), frames.shape[1], -1)
