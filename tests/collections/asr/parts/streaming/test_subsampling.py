# SPDX-License-Identifier: Apache-2.0
"""Subsampling frame by frame gives what NeMo's gives of the whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo.collections.asr.parts.streaming.ring_buffers import Rows
from nemo.collections.asr.parts.streaming.subsampling import IncrementalSubsampling
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling

FEATURES, WIDTH, CHANNELS = 20, 12, 6
KINDS = st.sampled_from(['dw_striding', 'striding'])
FACTORS = st.sampled_from([2, 4, 8, 16])
LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=5)


def subsampling_of(kind='dw_striding', factor=8, channels=CHANNELS, features=FEATURES, activation=None):
    """NeMo's, with weights and biases that let every dependence show."""
    torch.manual_seed(0)
    activation = torch.nn.ReLU(True) if activation is None else activation
    found = ConvSubsampling(kind, factor, features, WIDTH, channels, activation=activation, is_causal=True)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return found.eval()


def features_of(lengths, features=FEATURES, seed=1):
    return torch.randn(len(lengths), max(*lengths, 1), features, generator=torch.Generator().manual_seed(seed))


def excerpt(features, lengths, row: int, first: int, count: int):
    """Features of an utterance; before it and behind it lies what must not be looked at."""
    found = torch.full((count, features.shape[2]), 1e6)
    start, end = max(first, 0), min(first + count, lengths[row])
    if start < end:
        found[start - first : end - first] = features[row, start:end]
    return found


def some(batch, *numbers, device='cpu'):
    """These rows of a batch; all without any."""
    return Rows(np.isin(np.arange(batch), numbers or np.arange(batch)), torch.device(device))


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-6 * max(expected.abs().max().item(), 1.0), rtol=0)


@torch.no_grad()
def in_any_phases(incremental, caches, features, lengths, sizes, pauses):
    """Step each stream at its own times, some frames at once, past its end; returns the frames of each [Q, D]."""
    factor, outputs, moment = incremental.factor, [[] for _ in lengths], 0
    frames, whole = [0] * len(lengths), [max(math.ceil((length - 1) / factor) + 1, 1) for length in lengths]
    while any(count < most for count, most in zip(frames, whole)):
        active = [
            row for row in range(len(lengths)) if frames[row] < whole[row] and (moment + row) % pauses[row % 3] == 0
        ]
        count = sizes[moment % len(sizes)]
        moment += 1
        if not active:
            continue
        rows = some(len(lengths), *active)
        first = [factor * (frames[row] - 1) + 1 for row in rows.numbers]
        pieces = [excerpt(features, lengths, *pair, factor * count) for pair in zip(rows.numbers, first)]
        left = torch.tensor([min(max(lengths[row] - at, 0), factor * count) for row, at in zip(rows.numbers, first)])
        begins = torch.tensor(first) < 0
        ending = left if (left < factor * count).any() else None
        found = incremental.step(caches, torch.stack(pieces), rows, begins if begins.any() else None, ending)
        for row, new in zip(rows.numbers, found):
            if row in active:
                outputs[row].append(new)
                frames[row] += count
    return [torch.cat(parts) for parts in outputs]


@settings(max_examples=60)
@given(
    KINDS,
    FACTORS,
    LENGTHS,
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
    st.sampled_from([20, 21, 80]),
)
def test_frames_of_streams_in_any_phases_equal_the_whole(kind, factor, lengths, sizes, pauses, width):
    subsampling = subsampling_of(kind, factor, features=width)
    incremental = IncrementalSubsampling(subsampling)
    caches = incremental.new_stage(len(lengths)).caches
    for seed in range(2):  # the second time in rows that others have left
        features = features_of(lengths, width, seed)
        with torch.no_grad():
            whole, counts = subsampling(x=features, lengths=torch.tensor(lengths))
        found = in_any_phases(incremental, caches, features, lengths, sizes, pauses)
        for row, count in enumerate(counts.tolist()):
            assert_near(found[row][:count], whole[row, :count])


@pytest.mark.parametrize('channels', [CHANNELS, 64, 256])  # summed, convolved, packed
@pytest.mark.parametrize('batch', [1, 3, 40])
def test_few_and_many_streams_of_any_width_equal_the_whole(channels, batch):
    subsampling, features = subsampling_of(channels=channels), features_of([17] * batch)
    incremental = IncrementalSubsampling(subsampling)
    caches, padded = incremental.new_stage(batch).caches, torch.nn.functional.pad(features, (0, 0, 7, 0))
    with torch.no_grad():
        whole, _ = subsampling(x=features, lengths=torch.full((batch,), 17))
        for frame in range(3):
            begins = torch.full((batch,), True) if frame == 0 else None
            found = incremental.step(caches, padded[:, 8 * frame : 8 * frame + 8], some(batch), begins)
            assert_near(found[:, 0], whole[:, frame])


def test_other_activations_are_theirs():
    subsampling, features = subsampling_of(activation=torch.nn.SiLU(), channels=256), features_of([9])
    incremental = IncrementalSubsampling(subsampling)
    caches, padded = incremental.new_stage(1).caches, torch.nn.functional.pad(features, (0, 0, 7, 0))
    with torch.no_grad():
        whole, _ = subsampling(x=features, lengths=torch.tensor([9]))
        assert_near(incremental.step(caches, padded[:, :8], some(1), torch.tensor([True])), whole[:, :1])
        assert_near(incremental.step(caches, padded[:, 8:16], some(1)), whole[:, 1:])
