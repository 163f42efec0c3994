# SPDX-License-Identifier: Apache-2.0
"""Many live streams as one batch: from samples to encoder frames, whatever the phase of each.

What each stream has received is counted on the host, and all else follows from these counts: which features are complete,
which frames are due, where in the rings they lie, what is seen of them. So streams begin, end and begin anew without
touching the others, there is no Python loop over them, and nothing is read back from the device.

A step pushes frames through all layers, some at a time (``block``), for the rows that have any. A layer that waits for r frames
gives out what arrived r frames before; so positions run behind by r from layer to layer, and a stream that ends is pushed on
with frames that nobody sees until its last is out.

Shapes: B streams, R rows of them, N samples, F features, Q frames of a push, D the encoder's width, S slots of a ring.
"""

from typing import NamedTuple

import numpy as np
import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.streaming import prepared
from nemo.collections.asr.parts.streaming.encoder import StreamingEncoder
from nemo.collections.asr.parts.streaming.features import StreamingFeatures
from nemo.collections.asr.parts.streaming.layers import Visible
from nemo.collections.asr.parts.streaming.mel import BatchedMel
from nemo.collections.asr.parts.streaming.prepared import PreparedEncoder
from nemo.collections.asr.parts.streaming.rings import BatchedState, LayerRings

BLOCK = 4  # frames that a few streams push at once where they have them
FEW = 8  # streams
GROWTH = 64  # slots of a ring without a limit, to begin with
NEVER = np.iinfo(np.int64).max // 2  # where a stream ends that does not
KEPT = 512  # masks and places of steps that come again


class _Ends(NamedTuple):
    """What is known of streams that end in this step, each [B] int64."""

    features: np.ndarray
    """All of a stream's features; very many where it goes on."""
    frames: np.ndarray
    """All of its encoder frames."""


class BatchedStreams:
    """Runs preprocessor and encoder on a batch of streams; the state is in a :class:`BatchedState`.

    Args:
        front_end: of the preprocessor.
        encoder: of the encoder and the context, as NeMo's layers run it.
        batch: B.
        precision: of the layers' weights, see :class:`PreparedLinear`.
    """

    def __init__(
        self, front_end: StreamingFeatures, encoder: StreamingEncoder, batch: int, precision: str = 'float32'
    ):
        self.encoder, self.batch, self.device, self.dtype = encoder, batch, encoder.device, encoder.dtype
        self.factor, self.chunk, self.style = encoder.factor, encoder.chunk, encoder.encoder.att_context_style
        self.precision = precision
        self.block = max(self.chunk, BLOCK if batch <= FEW and self.chunk == 1 else 1)
        self.unit = self.block * self.factor * front_end.hop  # samples that are taken at once
        self.mel = BatchedMel(front_end, self.unit)
        self.feature_ring = self.factor * (2 * self.block + 3)
        self.lag = sum(encoder.waits)
        self.behind = np.cumsum([0, *encoder.waits[:-1]]).tolist()  # of each layer, in frames
        scale = encoder.encoder.pos_enc.xscale
        self.scale = 1.0 if scale is None else float(scale)
        self._unlimited = [window.context.left == UNLIMITED for window in encoder.windows]
        self._layers = list(zip(encoder.windows, self.behind, encoder.waits))
        self._kept: dict = {}

    @staticmethod
    def why_not(front_end: StreamingFeatures, encoder: StreamingEncoder) -> str | None:
        """Return why a model cannot be run in this way, or None."""
        return BatchedMel.why_not(front_end.preprocessor.featurizer) or prepared.why_not(encoder.encoder)

    def weights(self) -> PreparedEncoder:
        """Return the weights, as they are now."""
        return PreparedEncoder.of(self.encoder.encoder, self.precision)

    def new_state(self) -> BatchedState:
        """Return the state before the first sample."""
        weights, batch = PreparedEncoder.of(self.encoder.encoder, self.precision, by_value=True), self.batch
        counts = (np.zeros(batch, np.int64) for _ in range(3))
        features = torch.zeros(batch, self.feature_ring, self.mel.features, dtype=self.dtype, device=self.device)
        layers = [
            layer.new_rings(batch, self.slots(window), waits)
            for layer, window, waits in zip(weights.layers, self.encoder.windows, self.encoder.waits)
        ]
        caches = weights.subsampling.new_caches(batch)
        return BatchedState(*counts, self.mel.new_ring(batch), features, caches, layers)

    def slots(self, window: Window) -> int:
        """Return how many slots a layer's ring has; without a limit, to begin with."""
        context = window.context
        if context.left == UNLIMITED:
            return GROWTH
        return context.left + self.block + (0 if self.style == 'chunked_limited' else context.right)

    def is_unlimited(self, layer: int) -> bool:
        """Return whether a layer sees all of the past."""
        return self._unlimited[layer]

    def forget(self, state: BatchedState, rows: list[int]) -> None:
        """Set streams back to their beginning."""
        for counts in (state.received, state.featured, state.frames):
            counts[rows] = 0
        for cache in [*state.subsampling, *(rings.convolution for rings in state.layers)]:
            cache[rows] = 0  # of all else nothing is seen

    def step(
        self,
        state: BatchedState,
        samples: torch.Tensor,
        lengths: np.ndarray,
        ends: np.ndarray,
        keep_features: bool = False,
    ) -> tuple:
        """Take samples, and return what they complete; the state moves on.

        Args:
            state: changes in place.
            samples: [B, N] float32.
            lengths: how many of each row belong to its stream, [B] int64.
            ends: which streams end with these, [B] bool.
            keep_features: whether to return the features, too.

        Returns:
            the features [B, T, F] and how many each stream has [B] (None without them), the encoder's frames [B, A, D] and
            how many each has [B]; zeros behind them; counts are numpy's.
        """
        weights = self.weights()
        features, frames = _Gathered(self.batch) if keep_features else None, _Gathered(self.batch)
        count = max(-(-samples.shape[1] // self.unit), 1)
        for index in range(count):
            start = index * self.unit
            some = lengths if count == 1 else np.clip(lengths - start, 0, self.unit)
            last = ends if index == count - 1 else np.zeros_like(ends)
            self._take(state, samples[:, start : start + self.unit], some, last, features)
            self._push_all(weights, state, last, frames)
        like = dict(dtype=self.dtype, device=self.device)
        found = features.result(self.mel.features, **like) if keep_features else (None, None)
        return *found, *frames.result(self.encoder.width, **like)

    def frames_of(self, state: BatchedState, ended: np.ndarray) -> np.ndarray:
        """Return how many frames of each stream have entered the layers, [B]; ``ended`` [B] says which have ended."""
        return np.where(ended, self._total(state), state.frames) if ended.any() else state.frames

    def _total(self, state: BatchedState) -> np.ndarray:
        """Return how many encoder frames offline makes of the features, [B]."""
        return np.maximum(-(-(state.featured - 1) // self.factor) + 1, 1)  # one more than is complete

    def _take(self, state: BatchedState, samples, lengths, ends, gathered: '_Gathered | None') -> None:
        """Take samples, and compute the features that they complete."""
        self.mel.write(state.samples, samples, lengths, state.received)
        state.received += lengths
        new = np.maximum(self.mel.complete(state.received, ends) - state.featured, 0)
        most = int(new.max())
        if not most:
            return
        active = np.flatnonzero(new)
        rows, first = self._rows(active), state.featured[active]
        found = self.mel.frames(state.samples, rows, first, most, state.received[active]).to(state.features.dtype)
        valid = np.arange(most) < new[active, None]
        self._write_features(state.features, found, active, first, valid)
        if gathered is not None:
            gathered.add(found, active, valid)
        state.featured += new

    def _write_features(self, ring: torch.Tensor, found, active, first, valid) -> None:
        """Put features [R, T, F] into their places in the rings."""
        size, count = ring.shape[1], valid.shape[1]
        if len(active) == self.batch and _are_alike(first) and valid.all():
            start = int(first[0]) % size
            room = min(size - start, count)
            ring[:, start : start + room] = found[:, :room]
            ring[:, : count - room] = found[:, room:]
            return
        rows, columns = np.nonzero(valid)
        places = (first[rows] + columns) % size
        index = (torch.from_numpy(values).to(ring.device) for values in (active[rows], places, rows, columns))
        to_row, to_place, from_row, from_column = index
        ring[to_row, to_place] = found[from_row, from_column]

    def _push_all(self, weights: PreparedEncoder, state: BatchedState, ends: np.ndarray, out: '_Gathered') -> None:
        """Push all frames that are due through the layers."""
        due = -(-state.featured // self.factor) // self.chunk * self.chunk - state.frames
        ending = None
        if ends.any():
            total = self._total(state)
            ending = _Ends(np.where(ends, state.featured, NEVER), np.where(ends, total, NEVER))
            due = np.where(ends, total + self.lag - state.frames, due)
            due = -(-due // self.chunk) * self.chunk  # of the last chunk all frames, were they said or not
        most = due.max()
        while most > 0:
            count = self.block if most >= self.block else 1
            active = np.flatnonzero(due >= count)
            self._push(weights, state, active, count, ending, out)
            state.frames[active] += count
            due[active] -= count
            most = due.max()

    def _push(
        self, weights: PreparedEncoder, state: BatchedState, active, count: int, ends: _Ends | None, out
    ) -> None:
        """Push some frames of the streams ``active`` through all layers."""
        rows, first = self._rows(active), state.frames[active]
        last = None if ends is None else ends.frames[active]
        frames = self._subsample(weights, state, rows, active, count, ends)
        if self.scale != 1.0:
            frames = frames * self.scale
        seen: dict = {}
        for index, (layer, rings) in enumerate(zip(weights.layers, state.layers)):
            key = window, behind, waits = self._layers[index]
            if self._unlimited[index]:
                give_slots(rings, int(first.max()) - behind + count)
            found = seen.get(key)
            if found is None:
                found = self._visible(window, rings.keys_values.shape[3], waits, first - behind, count, last)
                seen[key] = found
            visible, future, past = found
            frames = layer.step(rings, frames, rows, visible, weights.positions(index, future, past))
        if weights.out is not None:
            frames = weights.out(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        place = first[:, None] - self.lag + np.arange(count)
        valid = place >= 0 if last is None else (place >= 0) & (place < last[:, None])
        if valid.any():
            out.add(frames, active, valid)

    def _subsample(self, weights: PreparedEncoder, state: BatchedState, rows, active, count: int, ends: _Ends | None):
        """Return the frames that enter the first layer, [R, Q, D]."""
        first = self.factor * (state.frames[active] - 1) + 1  # feature of each
        width = self.factor * count
        ring, size = state.features, self.feature_ring
        if _are_alike(first):
            start = int(first[0]) % size
            own = ring if rows is None else ring[rows]
            found = own[:, start : start + width]
            if start + width > size:
                found = torch.cat((found, own[:, : start + width - size]), dim=1)
        else:
            places = self._tensor((first[:, None] + np.arange(width)) % size)
            index = torch.arange(self.batch, device=self.device) if rows is None else rows
            found = ring[index[:, None], places]
        begins = self._tensor(first < 0) if first.min() < 0 else None
        if begins is None and ends is None:
            return weights.subsampling.step(state.subsampling, found, rows)
        place, total = first[:, None] + np.arange(width), NEVER if ends is None else ends.features[active][:, None]
        found = found * self._tensor((place >= 0) & (place < total)).unsqueeze(2)
        left = None if ends is None else self._tensor(np.clip(total[:, 0] - first, 0, width))
        return weights.subsampling.step(state.subsampling, found, rows, begins, left)

    def _visible(self, window: Window, slots: int, waits: int, first: np.ndarray, count: int, last) -> tuple:
        """Return what the queries of a step see, and how far ahead and behind the table of positions has to reach.

        Args:
            window: of the layer.
            slots: S.
            waits: frames that it waits.
            first: position of the first frame that arrives, [R].
            count: Q.
            last: position behind the last frame of each stream, [R]; None: none ends.
        """
        context, alike = window.context, _are_alike(first)
        unlimited = context.left == UNLIMITED
        future = self.chunk - 1 if self.style == 'chunked_limited' else context.right
        past = slots - 1 if unlimited else context.left + (self.chunk - 1)
        if not alike or unlimited or last is not None or first[0] < slots + waits:
            first = first[:1] if alike else first
            return self._compute_visible(window, slots, waits, first, count, last, future, past), future, past
        key = window, waits, count, int(first[0]) % (slots * self.chunk)  # it comes again and again
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            visible = self._compute_visible(window, slots, waits, first[:1], count, None, future, past)
            self._kept[key] = visible, future, past
        return self._kept[key]

    def _compute_visible(self, window, slots, waits, first, count, last, future, past) -> Visible:
        arriving = first[:, None] + np.arange(count)  # [R, Q]
        newest = arriving[:, -1:, None]
        held = newest - (newest - np.arange(slots)) % slots  # the frame that each slot holds, [R, 1, S]
        query = arriving[:, :, None] - waits  # [R, Q, 1]
        ages = np.clip(query - held, -future, past) + future
        sees = window.sees(torch.from_numpy(np.maximum(query, 0)), torch.from_numpy(held)).numpy()
        hidden = ~sees | (held < 0)
        if last is not None:
            hidden = hidden | (held >= last[:, None, None])
        began = query >= 0
        alike = len(first) == 1
        slots_of = arriving % slots
        return Visible(
            self._tensor(slots_of[0] if alike else slots_of),
            self._tensor(ages[0] if alike else ages),
            self._tensor(hidden).unsqueeze(1) if hidden.any() else None,
            None if began.all() else self._tensor(began),
        )

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def _rows(self, active: np.ndarray) -> torch.Tensor | None:
        return None if len(active) == self.batch else self._tensor(active)


class _Gathered:
    """Frames that come out a few at a time, stream by stream."""

    def __init__(self, batch: int):
        self.counts = np.zeros(batch, np.int64)
        self.parts: list = []

    def add(self, frames: torch.Tensor, active: np.ndarray, valid: np.ndarray) -> None:
        """Take frames [R, Q, D] of the streams ``active`` [R], of which ``valid`` [R, Q] count."""
        together = valid.all() and len(active) == len(self.counts)
        self.parts.append((frames, together, active, valid, self.counts[active]))
        self.counts[active] += valid.sum(axis=1)

    def result(self, width: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
        """Return all frames [B, A, D], with zeros behind each stream's own, and how many each has [B]."""
        if self.parts and all(together for _, together, *_ in self.parts):
            frames = [part[0] for part in self.parts]
            return (frames[0] if len(frames) == 1 else torch.cat(frames, dim=1)), self.counts
        joined = torch.zeros(len(self.counts), int(self.counts.max()), width, dtype=dtype, device=device)
        for frames, _, active, valid, before in self.parts:
            rows, columns = np.nonzero(valid)
            places = before[rows] + np.cumsum(valid, axis=1)[rows, columns] - 1
            index = (torch.from_numpy(values).to(device) for values in (active[rows], places, rows, columns))
            to_row, to_place, from_row, from_column = index
            joined[to_row, to_place] = frames[from_row, from_column].to(dtype)
        return joined, self.counts


def _are_alike(counts: np.ndarray) -> bool:
    return len(counts) == 1 or bool((counts == counts[0]).all())


def give_slots(rings: LayerRings, needed: int) -> None:
    """Give a ring without a limit twice the slots until all frames have one of their own."""
    slots = rings.keys_values.shape[3]
    while slots < needed:
        slots *= 2
    if slots > rings.keys_values.shape[3]:
        more = slots - rings.keys_values.shape[3]
        rings.keys_values = torch.nn.functional.pad(rings.keys_values, (0, 0, 0, more))
