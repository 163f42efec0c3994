# SPDX-License-Identifier: Apache-2.0
"""States that were saved by sessions of one stream after the other (versions 1 to 3), carried on as one batch.

They hold the inputs of the attention, of which keys and values are made here, once; features instead of the last rows of the
convolutions, which come out of them again; and frames that wait, as they came.

Shapes: R rows of one stream (1), C cached frames, D the encoder's width.
"""

import numpy as np
import torch

from nemo.collections.asr.parts.streaming.batched import BatchedStreams, give_slots
from nemo.collections.asr.parts.streaming.rings import BatchedState
from nemo.collections.asr.parts.streaming.state import StreamState


def carried_on(earlier: StreamState, streams: BatchedStreams) -> BatchedState:
    """Return the state of a batch that goes on where streams one by one were.

    Args:
        earlier: their state; streams of the same number, model and context.
        streams: what runs the batch.
    """
    state, weights = streams.new_state(), streams.weights()
    for row in range(streams.batch):
        _carry_samples(earlier, state, row)
        _carry_features(earlier, state, row, streams, weights)
        _carry_layers(earlier, state, row, streams, weights)
    return state


def _carry_samples(earlier: StreamState, state: BatchedState, row: int) -> None:
    tail = earlier.tails[row]
    size = state.samples.shape[1]
    kept = tail.samples[-size:]
    places = np.arange(tail.received - len(kept), tail.received) % size
    state.samples[row, torch.from_numpy(places).to(kept.device)] = kept
    state.received[row] = tail.received


def _carry_features(earlier: StreamState, state: BatchedState, row: int, streams: BatchedStreams, weights) -> None:
    """Carry the features on, and let the convolutions see those of the last frame that is out."""
    features, received, frames = (getattr(earlier.encoder, name)[row] for name in ('features', 'received', 'frames'))
    state.featured[row], state.frames[row] = received, frames
    size, factor = state.features.shape[1], streams.factor
    kept = features[:, -size:].T
    places = np.arange(received - len(kept), received) % size
    state.features[row, torch.from_numpy(places).to(kept.device)] = kept
    if not frames:
        return
    first = factor * (frames - 2) + 1  # of the features of the last frame
    start = received - features.shape[1]
    own = features.T[max(first - start, 0) : factor * (frames - 1) + 1 - start].unsqueeze(0)
    own = torch.nn.functional.pad(own, (0, 0, factor - own.shape[1], 0))
    if first > 0:
        state.subsampling[0][row, 0, :, 0] = features[:, first - 1 - start]
    begins = torch.tensor([frames == 1], device=own.device)
    weights.subsampling.step(state.subsampling, own, torch.tensor([row], device=own.device), begins)


def _carry_layers(earlier: StreamState, state: BatchedState, row: int, streams: BatchedStreams, weights) -> None:
    for index, (cache, rings, layer) in enumerate(zip(earlier.encoder.layers, state.layers, weights.layers)):
        arrived = max(earlier.encoder.frames[row] - streams.behind[index], 0)
        waiting = min(arrived, streams.encoder.waits[index])
        rings.convolution[row] = cache.convolution[row].T
        emitted = arrived - waiting
        known = cache.attention[row, max(cache.attention.shape[1] - emitted, 0) :]
        projected = [layer.projections(known)]
        if waiting:
            frames, later = layer.arrive(cache.pending[row, cache.pending.shape[1] - waiting :])
            rings.waiting[row, -waiting:], rings.queries[row, -waiting:] = frames, later[:, : layer.width]
            projected.append(later)
        projected = torch.cat(projected)
        if streams.is_unlimited(index):
            give_slots(rings, arrived)
        slots = rings.keys_values.shape[3]
        projected = projected[-slots:].unflatten(1, (3, layer.heads, layer.head_width))
        places = torch.from_numpy(np.arange(arrived - len(projected), arrived) % slots).to(projected.device)
        rings.keys_values[row][:, :, places] = projected[:, 1:].permute(1, 2, 0, 3)
