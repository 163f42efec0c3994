# SPDX-License-Identifier: Apache-2.0
"""Many live streams as one batch: from samples to encoder frames, whatever the phase of each.

Counts on the CPU give which features are complete, which frames are due, where in the rings they are, and what is seen of
them. So there is no Python loop over streams, and nothing is read back from the device. A layer that waits for r frames gives
out what arrived r frames before. A stream that ends is pushed on with frames that no query sees until its last one is out.

Shapes: B streams, R of them, N samples, F features, T feature frames, Q frames of a push, D the width, A encoder frames.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nemo.collections.asr.modules.ssl_modules.quantizers import without_autocast
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.streaming.layers import GROWTH, LayerStage
from nemo.collections.asr.parts.streaming.mel import StreamingMel
from nemo.collections.asr.parts.streaming.prepared_weights import PreparedEncoder, check_encoder_can_stream
from nemo.collections.asr.parts.streaming.ring_buffers import RingBuffer, Rows, Stage, Visible, ring_window

FEATURES = 'sample_rate', 'n_fft', 'win_length', 'hop_length', 'nfilt', 'preemph', 'mag_power', 'log'
BLOCK = 4  # frames that are pushed at once where streams have them
NEVER = np.iinfo(np.int64).max // 2  # where a stream ends that does not


class BatchRunner:
    """Runs preprocessor and encoder on a batch of streams, in a context; ``stages`` is all their state.

    Layers with a right context in ``regular`` style wait for frames, so look-aheads add up. Observers get feature frames
    [R, T, F], or the frames [R, Q, D] that enter the first layer, with the numbers of their streams [R], and which frames
    are a stream's own [R, T or Q] bool; they return what replaces them.
    """

    def __init__(self, mel: StreamingMel, encoder: Any, context: AttContext, batch: int, weights: str, observers: Any):
        check_encoder_can_stream(encoder, context)
        self.mel, self.context, self.observers = mel, context, observers
        self.weights = prepared = PreparedEncoder.of(encoder, weights)
        self.windows, self.style = encoder.effective_windows(context), encoder.att_context_style
        self.factor, self.chunk = encoder.subsampling_factor, Window(context, self.style).chunk
        self.width = encoder.d_model if encoder.out_proj is None else encoder.out_proj.out_features
        weight, chunked = next(encoder.parameters()), self.style == 'chunked_limited'
        self.device, self.like = weight.device, dict(dtype=weight.dtype, device=weight.device)
        waits = [0 if chunked else window.context.right for window in self.windows]  # of each layer, in frames
        self.lag = sum(waits)
        self.look_ahead = context.right if chunked else self.lag
        self.block = -(-BLOCK // self.chunk) * self.chunk
        self.unit = self.block * self.factor * mel.hop  # samples that are taken at once
        self._whole = Rows(np.ones(batch, bool), self.device)
        self.samples = mel.new_ring(batch, self.unit)
        self.features = RingBuffer(batch, self.factor * (2 * self.block + 3), mel.features, **self.like)
        self.subsampling = prepared.subsampling.new_stage(batch)
        self.layers: list[LayerStage] = []
        for index, (layer, window, wait) in enumerate(zip(prepared.layers, self.windows, waits, strict=True)):
            left = window.context.left
            ring = ring_window(window, GROWTH if left == UNLIMITED else left + self.block + wait, wait, self.device)
            self.layers.append(LayerStage(batch, layer, ring, sum(waits[:index]), self.subsampling.count))
        self.stages: list[Stage] = [self.samples, self.features, self.subsampling, *self.layers]
        self._grows = any(stage.window.is_unlimited for stage in self.layers)

    def settings(self) -> dict[str, Any]:
        """Return what two runners must have in common to share a stream."""
        return {
            'att_context_size': self.context.as_list(),
            'layer_contexts': [window.context.as_list() for window in self.windows],
            'att_context_style': self.style,
            'dtype': str(self.like['dtype']).removeprefix('torch.'),
            'encoder': self.weights.digest,
            **{name: getattr(self.mel.featurizer, name) for name in FEATURES},
        }

    def received(self, encoder_frames: bool, ended: np.ndarray) -> torch.Tensor:
        """Return how many feature frames, or encoder frames, each stream has received, [B] int64."""
        counts = self.features.count.copy()
        if encoder_frames:
            counts = np.where(ended, self._total(), self.subsampling.count)
        return torch.from_numpy(counts).to(self.device, non_blocking=True)

    def step(self, samples: torch.Tensor, lengths: np.ndarray, ends: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Take samples [B, N] float32, of which ``lengths`` [B] are valid; streams of ``ends`` [B] end.

        Returns the frames that they complete [B, A, D], 0 behind a stream's own, and how many these are [B].
        """
        samples = samples[:, : int(lengths.max())].to(self.device, non_blocking=True)
        found: list[tuple[torch.Tensor, Rows, np.ndarray]] = []
        most = samples.shape[1]
        with without_autocast(self.device):
            for start in range(0, max(most, 1), self.unit):
                some = np.clip(lengths - start, 0, self.unit) if most > self.unit else lengths
                last = ends if most - start <= self.unit else np.zeros_like(ends)
                if some.any() or last.any():
                    self._take(samples[:, start : start + self.unit], some, last)
                    found += self._push_all(last)
        return self._joined(found)

    def _total(self) -> np.ndarray:
        """Return how many encoder frames offline makes of the features, [B]."""
        return np.maximum(-(-(self.features.count - 1) // self.factor) + 1, 1)  # one more than is complete

    def _take(self, samples: torch.Tensor, lengths: np.ndarray, ends: np.ndarray) -> None:
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
        if self.observers is not None and self.observers.pre_conv:
            found = self.observers.take(found, rows.numbers, np.arange(most) < counts[:, None])
        self.features.write(rows, found.to(self.like['dtype']), counts)

    def _push_all(self, ends: np.ndarray) -> Iterator[tuple[torch.Tensor, Rows, np.ndarray]]:
        """Push all due frames through the layers; yield [R, Q, D], the rows, and which frames are real [R, Q]."""
        due: Any = -(-self.features.count // self.factor) // self.chunk * self.chunk - self.subsampling.count
        ending = None
        if ends.any():
            total = self._total()
            ending = [np.where(ends, each, NEVER) for each in (self.features.count, total)]
            due = np.where(ends, total + self.lag - self.subsampling.count, due)
            due = -(-due // self.chunk) * self.chunk  # all frames of the last chunk
        while (most := due.max()) > 0:
            count = self.block if most >= self.block else self.chunk
            active = due >= count
            rows = self._rows(active)
            frames, valid = self._push(rows, count, ending)
            if valid.any():
                yield frames, rows, valid
            due[active] -= count

    def _push(self, rows: Rows, count: int, ends: list[np.ndarray] | None) -> tuple[torch.Tensor, np.ndarray]:
        """Push frames through all layers; ``ends``: each stream's features and frames. See :meth:`_push_all`."""
        first = rows.counts(self.subsampling.count)
        last = None if ends is None else rows.counts(ends[1])
        frames = self._subsample(rows, first, count, ends)
        if self.observers is not None and not self.observers.pre_conv:
            frames = self.observers.take(frames, rows.numbers, _own(rows, first, count, last))
        self.subsampling.count[rows.active] += count
        if self.weights.scale != 1.0:
            frames = frames * self.weights.scale
        if self._grows:
            for stage in self.layers:
                stage.reserve(count)
        seen: dict[Any, Visible] = {}
        for stage in self.layers:
            key = stage.window, stage.behind
            if key not in seen:
                seen[key] = stage.window.visible(first - stage.behind, count, last)
            frames = stage.layer.step(stage, frames, rows, seen[key])
        if self.weights.out is not None:
            frames = self.weights.out(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return frames, _own(rows, first - self.lag, count, last)

    def _subsample(self, rows: Rows, first: np.ndarray, count: int, ends: list[np.ndarray] | None) -> torch.Tensor:
        """Return the frames that enter the first layer, [R, Q, D]."""
        start, width = self.factor * (first - 1) + 1, self.factor * count  # the features of each
        found = self.features.read(rows, start, width)
        begins, left = self._tensor(start < 0) if start.min() < 0 else None, None
        if begins is not None or ends is not None:
            place = start[:, None] + np.arange(width)
            exists = place >= 0
            if ends is not None:
                total = rows.counts(ends[0])
                exists &= place < total[:, None]
                left = self._tensor(np.clip(total - start, 0, width))
            found = found.masked_fill(self._tensor(~exists).unsqueeze(2), 0.0)
        return self.weights.subsampling.step(self.subsampling.caches, found, rows, begins, left)

    def _joined(self, found: list[tuple[torch.Tensor, Rows, np.ndarray]]) -> tuple[torch.Tensor, np.ndarray]:
        """Join frames [R, Q, D] of which ``valid`` [R, Q] are a stream's own: [B, A, D], and their number [B]."""
        totals: np.ndarray = np.zeros((len(found) + 1, len(self.samples.count)), np.int64)  # before each part
        for index, (_, rows, valid) in enumerate(found):
            totals[index + 1, rows.numbers] = valid.sum(axis=1)
        totals = totals.cumsum(axis=0)
        if found and all(rows.is_whole and valid.all() for _, rows, valid in found):
            return found[0][0] if len(found) == 1 else torch.cat([frames for frames, *_ in found], dim=1), totals[-1]
        joined = torch.zeros(totals.shape[1], int(totals[-1].max()), self.width, **self.like)
        for before, (frames, rows, valid) in zip(totals, found):
            row, column = np.nonzero(valid)
            places = before[rows.numbers[row]] + np.cumsum(valid, axis=1)[row, column] - 1
            index = np.stack((rows.numbers[row], places, row, column))
            to_row, to_place, from_row, from_column = torch.from_numpy(index).to(self.device, non_blocking=True)
            joined[to_row, to_place] = frames[from_row, from_column].to(joined.dtype)
        return joined, totals[-1]

    def _rows(self, active: np.ndarray) -> Rows:
        return self._whole if active.all() else Rows(active, self.device)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


def _own(rows: Rows, first: np.ndarray, count: int, last: np.ndarray | None) -> np.ndarray:
    """Return which of ``count`` frames from ``first`` [R] on, before ``last`` [R], are a stream's, [R, Q]."""
    places = first[:, None] + np.arange(count)
    valid = (places >= 0) & rows.valid[:, None]
    return valid if last is None else valid & (places < last[:, None])
