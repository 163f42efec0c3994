# SPDX-License-Identifier: Apache-2.0
"""Many live streams as one batch: from samples to encoder frames, whatever the phase of each.

Counts on the CPU give which features are complete, which frames are due, where in the rings they lie, and what is seen of
them. So streams start and end without touching others, there is no Python loop over them, and nothing is read back from
the device.

A step pushes frames through all layers, up to ``block`` at a time, for the rows that have any. A layer that waits for r
frames gives out what arrived r frames before. So positions run behind by r from layer to layer, and a stream that ends is
pushed on with frames that no query sees until its last one is out.

Shapes: B streams, R rows of them, N samples, F features, T feature frames, Q frames of a push, D the encoder's width,
A encoder frames.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.streaming.encoder import StreamingEncoder
from nemo.collections.asr.parts.streaming.layers import LayerStage
from nemo.collections.asr.parts.streaming.mel import StreamingMel
from nemo.collections.asr.parts.streaming.prepared_weights import PreparedEncoder, without_autocast
from nemo.collections.asr.parts.streaming.ring_buffers import GROWTH, RingBuffer, RingWindow, Rows, Stage, ring_window

BLOCK = 4  # frames that are pushed at once where streams have them
NEVER = np.iinfo(np.int64).max // 2  # where a stream ends that does not


class _Ends(NamedTuple):
    """How long the streams of a step are, each [B] int64; ``NEVER`` where a stream continues."""

    features: np.ndarray
    frames: np.ndarray


class BatchRunner:
    """Runs preprocessor and encoder on a batch of streams; ``stages`` is all that it keeps of them.

    Args:
        mel: of the preprocessor.
        encoder: of the encoder and the context.
        batch: B.
        precision: of the layers' weights, a key of ``LINEARS``.
        on_features, on_frames: called with feature frames [R, T, F], or with the frames [R, Q, D] that enter the first layer,
            with the number of each row's stream [R], and which frames are a stream's own [R, T or Q] bool. Returns what to go
            on with.
    """

    def __init__(
        self,
        mel: StreamingMel,
        encoder: StreamingEncoder,
        batch: int,
        precision: str = 'float32',
        on_features: Callable | None = None,
        on_frames: Callable | None = None,
    ):
        self.mel, self.encoder, self.on_features, self.on_frames = mel, encoder, on_features, on_frames
        self.weights = weights = PreparedEncoder.of(encoder.encoder, precision)
        self.device, self.factor, self.chunk = encoder.device, encoder.factor, encoder.chunk
        self.block = -(-BLOCK // self.chunk) * self.chunk
        self.unit = self.block * self.factor * mel.hop  # samples that are taken at once
        self.lag = sum(encoder.waits)
        self._whole = Rows(np.ones(batch, bool), self.device)
        self.samples = mel.new_ring(batch, self.unit)
        like = dict(dtype=encoder.dtype, device=self.device)
        self.features = RingBuffer(batch, self.factor * (2 * self.block + 3), mel.features, **like)
        self.subsampling = weights.subsampling.new_stage(batch)
        behind = np.cumsum([0, *encoder.waits[:-1]]).tolist()  # of each layer, in frames
        self.layers = [
            LayerStage(batch, layer, self._ring(window, wait), before, self.subsampling.count)
            for layer, window, wait, before in zip(weights.layers, encoder.windows, encoder.waits, behind, strict=True)
        ]
        self.stages: list[Stage] = [self.samples, self.features, self.subsampling, *self.layers]
        self._positions: list = [(None, None)] * len(self.layers)  # window and table of each layer
        self._update_tables()
        self._grows = any(stage.window.is_unlimited for stage in self.layers)

    def _ring(self, window: Window, wait: int) -> RingWindow:
        left, right = window.context
        ahead = 0 if self.encoder.style == 'chunked_limited' else right
        slots = GROWTH if left == UNLIMITED else left + self.block + ahead
        return ring_window(window, slots, wait, self.device)

    def bytes(self) -> int:
        """Return how many bytes the streams and the tables of positions take."""
        return sum(stage.bytes() for stage in self.stages) + sum(table.bytes() for _, table in self._positions)

    def reset(self, rows: list[int], counts: bool = True) -> None:
        """Restart streams; without ``counts`` their values become 0 and the batch continues."""
        for stage in self.stages:
            stage.reset(rows, counts)
        self._update_tables()

    def received(self, encoder_frames: bool, ended: np.ndarray) -> torch.Tensor:
        """Return how many feature frames, or encoder frames, each stream has received, [B] int64."""
        counts = self.features.count
        if encoder_frames:
            counts = np.where(ended, self._total(), self.subsampling.count)
        return torch.from_numpy(counts.copy()).to(self.device, non_blocking=True)

    def step(self, samples: torch.Tensor, lengths: np.ndarray, ends: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Take samples, and return the frames that they complete [B, A, D], 0 behind a stream's own, and how many [B].

        Args:
            samples: [B, N] float32, on any device.
            lengths: how many of each row belong to its stream, [B] int64.
            ends: which streams end with these, [B] bool.
        """
        samples = samples[:, : int(lengths.max())].to(self.device, non_blocking=True)
        found = _Gathered(len(ends))
        count = max(-(-samples.shape[1] // self.unit), 1)
        with without_autocast(self.device):
            for index in range(count):
                start = index * self.unit
                some = lengths if count == 1 else np.clip(lengths - start, 0, self.unit)
                last = ends if index == count - 1 else np.zeros_like(ends)
                if some.any() or last.any():
                    self._take(samples[:, start : start + self.unit], some, last)
                    self._push_all(last, found)
        return found.result(self.encoder.width, self.encoder.dtype, self.device)

    def _total(self) -> np.ndarray:
        """Return how many encoder frames offline makes of the features, [B]."""
        return np.maximum(-(-(self.features.count - 1) // self.factor) + 1, 1)  # one more than is complete

    def _take(self, samples: torch.Tensor, lengths: np.ndarray, ends: np.ndarray) -> None:
        """Take samples, and compute the features that they complete."""
        if samples.shape[1]:
            rows = self._rows(lengths > 0)
            self.samples.write(rows, rows.select(samples), lengths[rows.numbers])
        new = np.maximum(self.mel.complete(self.samples.count, ends) - self.features.count, 0)
        most = int(new.max())
        if not most:
            return
        rows = self._rows(new > 0)
        counts = new[rows.numbers]
        found = self.mel.frames(self.samples, rows, rows.counts(self.features.count), most)
        if self.on_features is not None:
            found = self.on_features(found, rows.numbers, np.arange(most) < counts[:, None])
        self.features.write(rows, found.to(self.encoder.dtype), counts)

    def _push_all(self, ends: np.ndarray, out: '_Gathered') -> None:
        """Push all frames that are due through the layers."""
        due = -(-self.features.count // self.factor) // self.chunk * self.chunk - self.subsampling.count
        ending = None
        if ends.any():
            total = self._total()
            ending = _Ends(np.where(ends, self.features.count, NEVER), np.where(ends, total, NEVER))
            due = np.where(ends, total + self.lag - self.subsampling.count, due)
            due = -(-due // self.chunk) * self.chunk  # all frames of the last chunk
        while (most := due.max()) > 0:
            count = self.block if most >= self.block else self.chunk
            active = due >= count
            self._push(self._rows(active), count, ending, out)
            due[active] -= count

    def _push(self, rows: Rows, count: int, ends: _Ends | None, out: '_Gathered') -> None:
        """Push some frames of some streams through all layers."""
        first = rows.counts(self.subsampling.count)
        last = None if ends is None else rows.counts(ends.frames)
        frames = self._subsample(rows, first, count, ends)
        if self.on_frames is not None:
            frames = self.on_frames(frames, rows.numbers, _own(rows, first, count, last))
        self.subsampling.count[rows.active] += count
        if self.weights.scale != 1.0:
            frames = frames * self.weights.scale
        if self._grows:
            for stage in self.layers:
                stage.reserve(stage.frames() + count)
            self._update_tables()
        seen: dict = {}
        for layer, stage, (_, table) in zip(self.weights.layers, self.layers, self._positions, strict=True):
            key = stage.window, stage.behind
            if key not in seen:
                seen[key] = stage.window.visible(first - stage.behind, count, last)
            frames = layer.step(stage, frames, rows, seen[key], table)
        if self.weights.out is not None:
            frames = self.weights.out(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        valid = _own(rows, first - self.lag, count, last)
        if valid.any():
            out.add(frames, rows, valid)

    def _update_tables(self) -> None:
        """Let the tables of positions follow the rings, which may have grown or shrunk."""
        for index, ((kept, _), stage) in enumerate(zip(self._positions, self.layers, strict=True)):
            window = stage.window
            if kept is not window:
                self._positions[index] = window, self.weights.positions(index, window.future, window.past)

    def _subsample(self, rows: Rows, first: np.ndarray, count: int, ends: _Ends | None) -> torch.Tensor:
        """Return the frames that enter the first layer, [R, Q, D]."""
        start, width = self.factor * (first - 1) + 1, self.factor * count  # the features of each
        found = self.features.read(rows, start, width)
        begins = self._tensor(start < 0) if start.min() < 0 else None
        step, caches = self.weights.subsampling.step, self.subsampling.caches
        if begins is None and ends is None:
            return step(caches, found, rows)
        total: Any = NEVER if ends is None else rows.counts(ends.features)[:, None]
        place = start[:, None] + np.arange(width)
        found = found.masked_fill(self._tensor((place < 0) | (place >= total)).unsqueeze(2), 0.0)
        left = None if ends is None else self._tensor(np.clip(total[:, 0] - start, 0, width))
        return step(caches, found, rows, begins, left)

    def _rows(self, active: np.ndarray) -> Rows:
        return self._whole if active.all() else Rows(active, self.device)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)


def _own(rows: Rows, first: np.ndarray, count: int, last: np.ndarray | None) -> np.ndarray:
    """Return which of ``count`` frames from ``first`` [R] on are a stream's own, [R, Q]; ``last`` [R] ends the streams."""
    places = first[:, None] + np.arange(count)
    valid = (places >= 0) & rows.valid[:, None]
    return valid if last is None else valid & (places < last[:, None])


class _Gathered:
    """Frames that come out a few at a time, stream by stream."""

    def __init__(self, batch: int):
        self.counts: np.ndarray = np.zeros(batch, np.int64)
        self.parts: list = []

    def add(self, frames: torch.Tensor, rows: Rows, valid: np.ndarray) -> None:
        """Take frames [R, Q, D] of some streams, of which ``valid`` [R, Q] are a stream's own."""
        alike = rows.is_whole and bool(valid.all())
        self.parts.append((frames, alike, rows.numbers, valid, self.counts[rows.numbers]))
        self.counts[rows.numbers] += valid.sum(axis=1)

    def result(self, width: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
        """Return all frames [B, A, D], with zeros behind each stream's own, and how many each has [B]."""
        if self.parts and all(alike for _, alike, *_ in self.parts):
            frames = [part[0] for part in self.parts]
            return (frames[0] if len(frames) == 1 else torch.cat(frames, dim=1)), self.counts
        joined = torch.zeros(len(self.counts), int(self.counts.max()), width, dtype=dtype, device=device)
        for frames, _, numbers, valid, before in self.parts:
            rows, columns = np.nonzero(valid)
            places = before[rows] + np.cumsum(valid, axis=1)[rows, columns] - 1
            index = np.stack((numbers[rows], places, rows, columns))
            to_row, to_place, from_row, from_column = torch.from_numpy(index).to(device, non_blocking=True)
            joined[to_row, to_place] = frames[from_row, from_column].to(dtype)
        return joined, self.counts
