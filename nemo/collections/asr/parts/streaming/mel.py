# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Mel features of many live streams at once, each frame computed once.

Sample s of a stream lies at s % S in its ring. What has been received is counted on the host, as a function of the lengths
that were fed; so nothing is read back from the device. Frame t is centred on sample t * hop. The transform takes the frames
that are asked for, and not an excerpt of the signal: against the preprocessor that rounds otherwise, by 2e-6 and less.

Shapes: B streams, R rows of them, N samples, S samples of a ring, T feature frames, F features.
"""

from collections.abc import Mapping
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F

from nemo.collections.asr.parts.preprocessing.features import check_fixed_statistics
from nemo.collections.asr.parts.streaming.features import StreamingFeatures


class BatchedMel:
    """A mel front end for streams in any phases; the samples are in rings that the caller keeps.

    Args:
        front_end: of the preprocessor, which has been checked.
        most: samples that are written at once, at most.
    """

    def __init__(self, front_end: StreamingFeatures, most: int):
        self.front_end, self.featurizer = front_end, front_end.preprocessor.featurizer
        featurizer = self.featurizer
        self.hop, self.features, self.look_ahead = front_end.hop, front_end.features, front_end.look_ahead
        left = (featurizer.n_fft - featurizer.win_length) // 2
        self._sides = left, featurizer.n_fft - featurizer.win_length - left  # zeros beside a window in the transform
        self._before = featurizer.n_fft // 2 - left  # samples of a window before its centre
        self.ring = most + featurizer.win_length + 2 * self.hop
        statistics = featurizer.normalize if isinstance(featurizer.normalize, Mapping) else None
        self._statistics = None
        if statistics is not None:
            checked = check_fixed_statistics(statistics, self.features)
            with torch.inference_mode(False):
                self._statistics = [torch.tensor(values, device=front_end.device) for values in checked.values()]

    @staticmethod
    def why_not(featurizer) -> Optional[str]:
        """Return why these features cannot be computed in this way, or None."""
        if featurizer.frame_splicing > 1:
            return f'preprocessor.frame_splicing is {featurizer.frame_splicing}'
        if featurizer.use_grads:
            return 'preprocessor.use_grads is true'
        return None

    def new_ring(self, batch: int) -> torch.Tensor:
        """Return the samples of streams before their first, [B, S] float32."""
        return torch.zeros(batch, self.ring, device=self.front_end.device)

    def write(self, ring: torch.Tensor, samples: torch.Tensor, lengths: np.ndarray, received: np.ndarray) -> None:
        """Take samples.

        Args:
            ring: [B, S]; changes in place.
            samples: [B, N] float32.
            lengths: how many of each row belong to its stream, [B].
            received: how many each has received before, [B].
        """
        count = samples.shape[1]
        if not count:
            return
        if (lengths == count).all() and (received == received[0]).all():
            start = int(received[0]) % self.ring
            room = min(self.ring - start, count)
            ring[:, start : start + room] = samples[:, :room]
            ring[:, : count - room] = samples[:, room:]
            return
        places = (received[:, None] + np.arange(count)) % self.ring
        if (lengths == count).all():
            ring.scatter_(1, torch.from_numpy(places).to(ring.device), samples)
            return
        rows, columns = np.nonzero(np.arange(count) < lengths[:, None])
        to = (torch.from_numpy(index).to(ring.device) for index in (rows, places[rows, columns], columns))
        rows, places, columns = to
        ring[rows, places] = samples[rows, columns]

    def complete(self, received: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Return how many frames so many samples complete, [B]; of an ended stream all that offline has."""
        heard = (received - self.look_ahead) // self.hop + 1
        if self.look_ahead >= self.hop and not ended.any():  # then there are no more in the whole
            return np.maximum(heard, 0)
        whole = self.featurizer.get_seq_len(torch.from_numpy(received)).numpy()
        whole = np.where(received == 0, 0, np.maximum(whole, 0))
        return np.where(ended, whole, np.clip(heard, 0, whole))

    def frames(
        self, ring: torch.Tensor, rows: Optional[torch.Tensor], first: np.ndarray, count: int, received: np.ndarray
    ) -> torch.Tensor:
        """Return frames of some rows, [R, T, F] float32.

        Args:
            ring: [B, S].
            rows: which, [R]; None: all.
            first: the first frame of each, [R].
            count: T.
            received: samples received by each, [R]; those behind count as zeros, as do those before the first.
        """
        start = first * self.hop - self._before - 1  # preemphasis looks one sample back
        span = (count - 1) * self.hop + self.featurizer.win_length + 1
        samples = self._window(ring if rows is None else ring[rows], start, span)
        inside = None
        if (start < 0).any() or (start + span > received).any():
            place = start[:, None] + np.arange(span)
            inside = torch.from_numpy((place >= 0) & (place < received[:, None])).to(ring.device)
            samples = samples * inside
        if self.featurizer.preemph is None:
            samples = samples[:, 1:]
        else:
            samples = samples[:, 1:] - self.featurizer.preemph * samples[:, :-1]
            if inside is not None:
                samples = samples * inside[:, 1:]  # behind the last there is nothing to emphasise
        return self._features_of(samples)

    def _window(self, ring: torch.Tensor, start: np.ndarray, span: int) -> torch.Tensor:
        """Return ``span`` samples from ``start`` on, [R, span]."""
        if (start == start[0]).all():
            begin = int(start[0]) % self.ring
            if begin + span <= self.ring:
                return ring[:, begin : begin + span]
            return torch.cat((ring[:, begin:], ring[:, : begin + span - self.ring]), dim=1)
        places = (start[:, None] + np.arange(span)) % self.ring
        return ring.gather(1, torch.from_numpy(places).to(ring.device))

    def _features_of(self, samples: torch.Tensor) -> torch.Tensor:
        featurizer = self.featurizer
        windows = samples.unfold(1, featurizer.win_length, self.hop) * featurizer.window
        # Zeros on both sides, as NeMo has them: behind it the power is the same, but rounds otherwise, by up to 6e-5.
        spectrum = torch.view_as_real(torch.fft.rfft(torch.constant_pad_nd(windows, self._sides)))
        power = spectrum.square().sum(-1)
        if featurizer.mag_power != 2.0:
            power = power.sqrt().pow(featurizer.mag_power)
        features = F.linear(power, featurizer.fb[0].to(power.dtype))
        if featurizer.log:
            guard = featurizer.log_zero_guard_value_fn(features)
            clamps = featurizer.log_zero_guard_type == 'clamp'
            features = torch.log(features.clamp(min=guard) if clamps else features + guard)
        if self._statistics is not None:
            mean, deviation = self._statistics
            features = (features - mean) / deviation
        return features
