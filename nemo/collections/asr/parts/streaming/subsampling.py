# SPDX-License-Identifier: Apache-2.0
"""Causal subsampling of many live streams at once; each convolution keeps the row that its next output needs.

A convolution of 3 frames in steps of 2 sees, for its frame i, the frames 2 * i - 2 ... 2 * i before it: two of them are new
to each output, one is the last of the step before. So encoder frame i takes the feature frames factor * (i - 1) + 1 ...
factor * i, and no frame is computed twice. Frames before a stream's first, and behind its last, are zero before each
convolution, as offline has them: the activation of a bias is not. Channels are last in memory, so that mixing them is a
matrix product.

Shapes: R rows (streams), Q encoder frames, T frames of a stage, F its frequencies, C channels, D the encoder's width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nemo.collections.asr.parts.streaming.linear import PreparedLinear

KERNEL, STRIDE = 3, 2
BLOCK = 16  # rows whose intermediate results stay in the processor's cache
SMALL = 1 << 15  # inputs of a convolution for which its set-up takes longer than a sum of products


class _Stage:
    """One convolution of 3 x 3 in steps of 2, and what follows it up to the activation.

    Args:
        convolution: over one channel, over all of them, or over each by itself.
        pointwise: the mixture of channels behind the last kind; else None.
        activation: behind both.
    """

    def __init__(self, convolution: nn.Conv2d, pointwise: nn.Conv2d | None, activation: nn.Module):
        self.channels = convolution.out_channels
        relu = isinstance(activation, nn.ReLU)
        self._activation = None if relu else activation
        if pointwise is None:  # inputs in the order frame, frequency, channel
            self._weight = None
            self._mixed = PreparedLinear(convolution.weight.permute(0, 2, 3, 1), convolution.bias, relu=relu)
            return
        self._mixed = PreparedLinear(pointwise.weight, pointwise.bias, relu=relu)
        self._bias = None if convolution.bias is None else convolution.bias.detach()
        self._weight = weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
        sums = weight.device.type == 'cpu' and weight.dtype == torch.float32
        self._taps = weight.permute(2, 3, 0, 1).reshape(KERNEL, KERNEL, 1, 1, -1) if sums else None

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Return [R, T, F', C'] for frames [R, 2 * T + 1, F, C] of which the first is cached."""
        if self._weight is None:
            inputs = _patches(frames).permute(0, 1, 2, 4, 5, 3).flatten(3)
        elif self._taps is not None and frames.numel() <= SMALL:
            inputs = (_patches(frames).permute(0, 4, 5, 1, 2, 3) * self._taps).flatten(1, 2).sum(1)
            inputs = inputs if self._bias is None else inputs.add_(self._bias)
        else:
            inputs = self._convolved(frames)
        outputs = self._mixed(inputs.reshape(-1, inputs.shape[3])).view(*inputs.shape[:3], -1)
        outputs = outputs if self._activation is None else self._activation(outputs)
        return outputs[:, :, : frames.shape[2] // STRIDE + 1]

    def _convolved(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the convolution [R, T, F', C'], with one frequency too many where those of the frames are odd."""
        # To pad both sides alike costs nothing, to pad one side is a copy.
        padding = 0, KERNEL - 1
        channels_first = frames.permute(0, 3, 1, 2)
        outputs = F.conv2d(channels_first, self._weight, self._bias, STRIDE, padding, groups=self.channels)
        return outputs.permute(0, 2, 3, 1)


class IncrementalSubsampling:
    """NeMo's ``dw_striding`` and ``striding`` subsampling, frame by frame; weights are those of the moment it is made.

    Args:
        subsampling: a causal ``ConvSubsampling``.
    """

    def __init__(self, subsampling: nn.Module):
        self.stages, pending = [], []
        for layer in subsampling.conv:
            pending.append(layer)
            if not isinstance(layer, nn.Conv2d):
                self.stages.append(_Stage(pending[0], pending[1] if len(pending) > 2 else None, layer))
                pending = []
        self.factor, self.features = subsampling.subsampling_factor, subsampling._feat_in
        weight = subsampling.out.weight.detach()
        channels = self.stages[-1].channels
        by_frequency = weight.view(len(weight), channels, -1).transpose(1, 2)  # ours have frequency before channel
        self.out = PreparedLinear(by_frequency.flatten(1), subsampling.out.bias)
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
        rows: torch.Tensor | None = None,
        begins: torch.Tensor | None = None,
        left: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the next encoder frames of some rows, [R, Q, D].

        Args:
            caches: of :meth:`new_caches`; change in place.
            features: [R, factor * Q, F], those that these frames take.
            rows: which rows of the caches these are, [R]; None: all.
            begins: whether a row's first frame is the first of its stream, [R] bool; None: none is. Its caches, and the
                features before the stream's first, count as zeros, whatever they are.
            left: of how many of the features there are any, [R] int64, where streams end; None: of all. Those behind count as
                zeros, whatever they are. A stream without any begins, and has factor - 1 left: those before it.
        """
        count = features.shape[0]
        size = BLOCK if features.device.type == 'cpu' else max(count, 1)
        parts = []
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            places = part if rows is None else rows[part]
            began, remain = (None if values is None else values[part] for values in (begins, left))
            parts.append(self._step(caches, features[part], places, began, remain))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _step(self, caches, features, rows, begins, left) -> torch.Tensor:
        frames, ahead = features.unsqueeze(-1), self.factor
        for stage, cache in zip(self.stages, caches):
            frames = torch.cat((cache[rows], frames), dim=1)
            if begins is not None:
                frames[:, :ahead].masked_fill_(begins[:, None, None, None], 0.0)
            if left is not None:
                behind = torch.arange(frames.shape[1], device=left.device) > left[:, None]
                frames.masked_fill_(behind[:, :, None, None], 0.0)
                left = torch.div(left + 1, STRIDE, rounding_mode='floor')
            cache[rows] = frames[:, -1:]
            frames = stage(frames)
            ahead //= STRIDE
        return self.out(frames.flatten(2).flatten(0, 1)).view(len(frames), frames.shape[1], -1)


def _patches(frames: torch.Tensor) -> torch.Tensor:
    """Return what each output of a convolution sees, [R, T, F', C, 3, 3], of frames [R, 2 * T + 1, F, C]."""
    padded = torch.constant_pad_nd(frames, (0, 0, KERNEL - 1, STRIDE - 1))
    return padded.unfold(1, KERNEL, STRIDE).unfold(2, KERNEL, STRIDE)
