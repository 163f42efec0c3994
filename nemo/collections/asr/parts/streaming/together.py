# SPDX-License-Identifier: Apache-2.0
"""Live streams together, as one batch: the way that a session takes wherever it can.

The counterpart of ``one_by_one.py``, for :class:`StreamingSession`; the work is that of ``batched.py``.

Shapes: B streams, N samples.
"""

from contextlib import nullcontext

import numpy as np
import torch

from nemo.collections.asr.parts.streaming.batched import BatchedStreams
from nemo.collections.asr.parts.streaming.carried import carried_on
from nemo.collections.asr.parts.streaming.output import StreamingOutput
from nemo.collections.asr.parts.streaming.rings import VERSION, BatchedState
from nemo.collections.asr.parts.streaming.state import StreamState


class Together:
    """Runs a batch of streams, and keeps their state.

    Args:
        streams: what runs them.
    """

    def __init__(self, streams: BatchedStreams):
        self._streams = streams
        self.reset()

    def reset(self) -> None:
        """Begin all streams anew."""
        self._rings = self._streams.new_state()

    def forget(self, rows: list[int]) -> None:
        """Begin some streams anew."""
        self._streams.forget(self._rings, rows)

    def received(self, encoder_frames: bool, ended: np.ndarray) -> torch.Tensor:
        """Return how many feature frames, or encoder frames, each stream has received, [B] int64."""
        counts = self._streams.frames_of(self._rings, ended) if encoder_frames else self._rings.featured
        return torch.from_numpy(counts.copy()).to(self._streams.device, non_blocking=True)

    def state(self, ended: list[bool]) -> BatchedState:
        """Return all state; it is not copied."""
        self._rings.ended = ended
        return self._rings

    def load(self, state: dict) -> list[bool]:
        """Take a saved state, of this way or of the other; returns which of its streams have ended."""
        device = self._streams.device
        if state.get('version', 1) == VERSION:
            self._rings = BatchedState.from_dict(state, device)
            return self._rings.ended
        earlier = StreamState.from_dict(state, None, device)
        with torch.inference_mode():
            self._rings = carried_on(earlier, self._streams)
        return earlier.ended

    def advance(self, samples, lengths: np.ndarray, ends: np.ndarray, keep_features: bool) -> StreamingOutput:
        """Take samples [B, N], which may be on another device, and return what they complete."""
        streams = self._streams
        device = streams.device
        samples = samples.to(device, non_blocking=True)
        with torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext():
            found = streams.step(self._rings, samples, lengths, ends, keep_features)
        features, feature_counts, encoded, counts = found
        output = StreamingOutput(encoded.transpose(1, 2), torch.from_numpy(counts).to(device, non_blocking=True), None)
        if keep_features:
            output.features = features.transpose(1, 2)
            output.feature_lengths = torch.from_numpy(feature_counts).to(device, non_blocking=True)
        return output
