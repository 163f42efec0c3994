# SPDX-License-Identifier: Apache-2.0
"""Mel features of many live streams, each frame computed once. Frame t is centred on sample t * hop.

Up to the transform the samples pass through the operations of the preprocessor, in its order and with its padding: a
transform of shifted inputs has other errors in bands that are next to empty.

Shapes: B streams, R rows of them, N samples, W samples of a span, T feature frames, F features.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo.collections.asr.parts.preprocessing.features import FilterbankFeatures, check_fixed_statistics
from nemo.collections.asr.parts.streaming.ring_buffers import RingBuffer, Rows


class StreamingMel:
    """The mel front end of NeMo's preprocessor; ValueError, with the reason, if it cannot stream."""

    def __init__(self, preprocessor: torch.nn.Module):
        featurizer: Any = getattr(preprocessor, 'featurizer', None)
        _check_features_can_stream(preprocessor, featurizer)
        self.featurizer, self.hop = featurizer, featurizer.hop_length
        self.sample_rate, self.features = featurizer.sample_rate, featurizer.nfilt * featurizer.frame_splicing
        self.device, self.dtype = featurizer.fb.device, preprocessor.dtype_sentinel_tensor.dtype
        self._left = (featurizer.n_fft - featurizer.win_length) // 2
        self._before = featurizer.n_fft // 2 - self._left  # samples of a window before its centre
        self.look_ahead = featurizer.win_length - self._before
        self._statistics = None
        with torch.inference_mode(False):
            if isinstance(featurizer.normalize, Mapping):
                checked = check_fixed_statistics(featurizer.normalize, self.features)
                self._statistics = [torch.tensor(values, device=self.device) for values in checked.values()]
            self._window = featurizer.window.to(torch.float32, copy=True)
            self._filters = featurizer.fb[0].to(torch.float32, copy=True)

    def new_ring(self, batch: int, most: int) -> RingBuffer:
        """Return the samples of streams before their first; at most ``most`` are written at once."""
        return RingBuffer(batch, most + self.featurizer.win_length + 2 * self.hop, device=self.device)

    def complete(self, received: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Return how many frames so many samples complete, [B]; of an ended stream all that offline has."""
        full = (received - self.look_ahead) // self.hop + 1  # windows
        whole = np.where(received == 0, 0, np.maximum((received - self.featurizer.n_fft % 2) // self.hop, 0))
        return np.where(ended, whole, np.clip(full, 0, whole))

    def frames(self, ring: RingBuffer, rows: Rows, first: np.ndarray, count: int) -> Tensor:
        """Return ``count`` frames of rows from ``first`` [R] on, [R, T, F]; samples outside are zeros."""
        start = first * self.hop - self._before - 1  # preemphasis takes one sample more
        received = rows.counts(ring.count)
        span = (count - 1) * self.hop + self.featurizer.win_length + 1
        samples, inside = ring.read(rows, start, span), None
        if start.min() < 0 or (start + span > received).any():
            bounds = torch.from_numpy(np.stack((start, received), axis=1)).to(self.device, non_blocking=True)
            places = bounds[:, :1] + torch.arange(span, device=self.device)
            inside = (places >= 0) & (places < bounds[:, 1:])
            samples = samples.masked_fill(~inside, 0.0)  # not multiplied: what the ring has there can be non-finite
        if self.featurizer.preemph is None:
            emphasised = samples[:, 1:]
        else:
            emphasised = samples[:, 1:] - self.featurizer.preemph * samples[:, :-1]
            if inside is not None:  # after a stream's last sample there is nothing to emphasise
                emphasised.masked_fill_(~inside[:, 1:], 0.0)
        return self._features_of(emphasised).to(self.dtype)

    def _features_of(self, samples: Tensor) -> Tensor:
        """Return the features [R, T, F] float32 of the windows of samples [R, W]."""
        featurizer, length = self.featurizer, self.featurizer.win_length
        windows = samples.unfold(1, length, self.hop) * self._window
        padded = torch.constant_pad_nd(windows, (self._left, featurizer.n_fft - length - self._left))
        real, imaginary = torch.view_as_real(torch.fft.rfft(padded)).unbind(-1)
        power = real.square().addcmul_(imaginary, imaginary)
        power = power if featurizer.mag_power == 2.0 else power.pow_(featurizer.mag_power / 2)
        features = F.linear(power, self._filters)
        if featurizer.log:
            guard = featurizer.log_zero_guard_value_fn(features)
            clamps = featurizer.log_zero_guard_type == 'clamp'
            features = (features.clamp_(min=guard) if clamps else features.add_(guard)).log_()
        if featurizer.frame_splicing > 1:
            features = features.repeat(1, 1, featurizer.frame_splicing)  # what NeMo's splicing amounts to
        if self._statistics is not None:
            mean, deviation = self._statistics
            features = features.sub_(mean).div_(deviation)
        return features


def _check_features_can_stream(preprocessor: torch.nn.Module, featurizer: Any) -> None:
    if not isinstance(featurizer, FilterbankFeatures) or type(featurizer).forward is not FilterbankFeatures.forward:
        kind = type(preprocessor).__name__
        raise ValueError(f"{kind} cannot be streamed; use AudioToMelSpectrogramPreprocessor (without use_torchaudio)")
    if any(module._forward_hooks or module._forward_pre_hooks for module in preprocessor.modules()):
        raise ValueError("the preprocessor has forward hooks, which streams do not support; remove them")
    if featurizer.normalize in ('per_feature', 'all_features'):
        found = f"preprocessor.normalize is {featurizer.normalize}, which needs the whole utterance"
        raise ValueError(f"{found}; use NA or fixed_mean and fixed_std, see compute_feature_stats.py")
    for name in ('exact_pad', 'use_grads'):
        if getattr(featurizer, name):
            raise ValueError(f"preprocessor.{name} is true, which streams do not support; set it to false")
    if featurizer.window is None:
        raise ValueError("preprocessor.window is none, which streams do not support; set it to hann")
