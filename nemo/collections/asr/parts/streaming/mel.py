# SPDX-License-Identifier: Apache-2.0
"""Mel features of many live streams at once, each frame computed once.

Sample s of a stream lies at s % S in its ring. What has been received is counted on the host, as a function of the lengths
that were fed; so nothing is read back from the device. Frame t is centred on sample t * hop.

Up to the transform the samples pass through the operations of the preprocessor, in its order and with its padding; only the
sums behind it are rounded otherwise. A pure tone or a rumble far above the rest makes this matter: a transform of other
inputs, if only shifted, has errors of its own in bands where there is next to nothing.

Shapes: B streams, R rows of them, N samples, S samples of a ring, W samples of a span, T feature frames, F features.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F

from nemo.collections.asr.parts.preprocessing.features import check_fixed_statistics
from nemo.collections.asr.parts.streaming.features import StreamingFeatures

KEPT = 64  # tables of places, of different rings and spans


class BatchedMel:
    """A mel front end for streams in any phases; the samples are in rings that the caller keeps.

    A result hangs on nothing that a call changes, so several threads may share it.

    Args:
        front_end: of the preprocessor, which has been checked; :meth:`why_not` must have nothing against its settings.
        most: samples that are written at once, at most.
    """

    def __init__(self, front_end: StreamingFeatures, most: int):
        self.front_end, self.featurizer = front_end, front_end.preprocessor.featurizer
        featurizer = self.featurizer
        self.hop, self.features, self.look_ahead = front_end.hop, front_end.features, front_end.look_ahead
        self._left = (featurizer.n_fft - featurizer.win_length) // 2
        self._before = featurizer.n_fft // 2 - self._left  # samples of a window before its centre
        self.ring = most + featurizer.win_length + 2 * self.hop
        self._statistics = None
        if isinstance(featurizer.normalize, Mapping):
            checked = check_fixed_statistics(featurizer.normalize, self.features)
            with torch.inference_mode(False):
                self._statistics = [torch.tensor(values, device=front_end.device) for values in checked.values()]
        self._places: dict = {}

    @staticmethod
    def why_not(featurizer) -> str | None:
        """Return why these features cannot be computed in this way, or None."""
        if featurizer.use_grads:
            return 'preprocessor.use_grads is true'
        if featurizer.window is None:
            return 'preprocessor.window is none'
        return None

    def new_ring(self, batch: int) -> torch.Tensor:
        """Return the samples of streams before their first, [B, S] float32."""
        return torch.zeros(batch, self.ring, device=self.front_end.device)

    def write(self, ring: torch.Tensor, samples: torch.Tensor, lengths: np.ndarray, received: np.ndarray) -> None:
        """Take samples.

        Args:
            ring: [B, S]; changes in place.
            samples: [B, N] float32, on the ring's device.
            lengths: how many of each row belong to its stream, [B]; 0 leaves a row alone.
            received: how many each has received before, [B].
        """
        count = samples.shape[1]
        if not count:
            return
        whole, start = bool((lengths == count).all()), received % self.ring
        if whole and _are_alike(start):
            begin = int(start[0])
            room = min(self.ring - begin, count)
            ring[:, begin : begin + room] = samples[:, :room]
            ring[:, : count - room] = samples[:, room:]
            return
        places = self._places_of(ring, start, count)
        if not whole:
            taken = torch.arange(count, device=ring.device) < _to(ring.device, lengths)[:, None]
            samples = torch.where(taken, samples, ring.gather(1, places))
        ring.scatter_(1, places, samples)

    def complete(self, received: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Return how many frames so many samples complete, [B]; of an ended stream all that offline has."""
        heard = (received - self.look_ahead) // self.hop + 1
        if self.look_ahead >= self.hop + self.featurizer.n_fft % 2 and not ended.any():  # no more are in the whole
            return np.maximum(heard, 0)
        whole = np.where(received == 0, 0, np.maximum((received - self.featurizer.n_fft % 2) // self.hop, 0))
        return np.where(ended, whole, np.clip(heard, 0, whole))

    def frames(
        self, ring: torch.Tensor, rows: torch.Tensor | None, first: np.ndarray, count: int, received: np.ndarray
    ) -> torch.Tensor:
        """Return frames of some rows, [R, T, F], in the dtype that the preprocessor gives out, computed in float32.

        Args:
            ring: [B, S].
            rows: which, [R]; None: all.
            first: the first frame of each, [R].
            count: T.
            received: samples received by each, [R]; those behind count as zeros, as do those before the first.
        """
        start = first * self.hop - self._before - 1  # preemphasis looks one sample back
        span = (count - 1) * self.hop + self.featurizer.win_length + 1
        samples = self._span(ring if rows is None else ring.index_select(0, rows), start, span)
        samples = self._emphasised(samples, _inside(ring.device, start, span, received))
        with _without_autocast(ring.device):
            features = self._features_of(samples, count)
        return features.to(self.front_end.preprocessor.dtype_sentinel_tensor.dtype)

    def _span(self, ring: torch.Tensor, start: np.ndarray, span: int) -> torch.Tensor:
        """Return ``span`` samples from ``start`` [R] on, [R, W]."""
        start = start % self.ring
        if not _are_alike(start):
            return ring.gather(1, self._places_of(ring, start, span))
        begin = int(start[0])
        if begin + span <= self.ring:
            return ring[:, begin : begin + span]
        return torch.cat((ring[:, begin:], ring[:, : begin + span - self.ring]), dim=1)

    def _places_of(self, ring: torch.Tensor, start: np.ndarray, count: int) -> torch.Tensor:
        """Return the places of ``count`` samples from the places ``start`` [R] on, [R, count] int64."""
        key = count, ring.device
        table = self._places.get(key)
        if table is None:
            if len(self._places) >= KEPT:
                self._places.clear()
            with torch.inference_mode(False):
                table = torch.arange(self.ring + count, device=ring.device).remainder_(self.ring)
            self._places[key] = table
        # a row is an excerpt of the table: to copy it takes a fifth of the time of computing it
        return table.unfold(0, count, 1).index_select(0, _to(ring.device, start))

    def _emphasised(self, samples: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
        """Return all but the first of the samples [R, W] with preemphasis; zero where not ``inside`` [R, W]."""
        if inside is not None:  # filled and not multiplied, for what a stream left in the ring may be no number
            samples = samples.masked_fill(~inside, 0.0)
        if self.featurizer.preemph is None:
            return samples[:, 1:]
        emphasised = samples[:, 1:] - self.featurizer.preemph * samples[:, :-1]
        # behind a stream's last sample there is nothing to emphasise
        return emphasised if inside is None else emphasised.masked_fill_(~inside[:, 1:], 0.0)

    def _features_of(self, samples: torch.Tensor, count: int) -> torch.Tensor:
        """Return the features [R, T, F] float32 of the windows that begin every ``hop`` samples."""
        featurizer = self.featurizer
        features = F.linear(self._spectrum(samples, count), featurizer.fb[0].to(torch.float32))
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

    def _spectrum(self, samples: torch.Tensor, count: int) -> torch.Tensor:
        """Return the magnitudes to the power of ``mag_power``, [R, T, n_fft // 2 + 1] float32."""
        featurizer, length = self.featurizer, self.featurizer.win_length
        windows = samples.unfold(1, length, self.hop) * featurizer.window.to(torch.float32)
        padded = torch.constant_pad_nd(windows, (self._left, featurizer.n_fft - length - self._left))
        real, imaginary = torch.view_as_real(torch.fft.rfft(padded)).unbind(-1)
        power = real.square().addcmul_(imaginary, imaginary)
        if featurizer.mag_power == 2.0:
            return power
        return power.sqrt_() if featurizer.mag_power == 1.0 else power.sqrt_().pow_(featurizer.mag_power)


def _inside(device: torch.device, start: np.ndarray, span: int, received: np.ndarray) -> torch.Tensor | None:
    """Return which of ``span`` samples from ``start`` [R] on a stream has, [R, W] bool; None: all."""
    if start.min() >= 0 and (start + span <= received).all():
        return None
    places = _to(device, start)[:, None] + torch.arange(span, device=device)
    return (places >= 0) & (places < _to(device, received)[:, None])


def _are_alike(counts: np.ndarray) -> bool:
    return len(counts) == 1 or bool((counts == counts[0]).all())


def _to(device: torch.device, counts: np.ndarray) -> torch.Tensor:
    """Return the host's counts [R] on the device."""
    return torch.from_numpy(counts).to(device, non_blocking=True)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which the filters are applied in float32, as the preprocessor does."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
