# SPDX-License-Identifier: Apache-2.0
"""Subsampling frame by frame gives what NeMo's gives of the whole."""

import numpy as np
import pytest
import torch

from nemo.collections.asr.parts.streaming.ring_buffers import Rows
from nemo.collections.asr.parts.streaming.subsampling import IncrementalSubsampling
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling

FEATURES, WIDTH, CHANNELS = 20, 12, 6


def subsampling_of(kind='dw_striding', factor=8, channels=CHANNELS, activation=None):
    """NeMo's, with weights and biases that let every dependence show."""
    torch.manual_seed(0)
    activation = torch.nn.ReLU(True) if activation is None else activation
    found = ConvSubsampling(kind, factor, FEATURES, WIDTH, channels, activation=activation, is_causal=True)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return found.eval()


def features_of(lengths):
    return torch.randn(len(lengths), max(lengths), FEATURES, generator=torch.Generator().manual_seed(1))


def some(batch):
    return Rows(np.ones(batch, bool), torch.device('cpu'))


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-6 * max(expected.abs().max().item(), 1.0), rtol=0)


@pytest.mark.parametrize('kind, factor', [('dw_striding', 2), ('dw_striding', 8), ('striding', 4), ('striding', 16)])
@pytest.mark.parametrize('channels', [CHANNELS, 64, 256])  # summed, convolved, packed
@pytest.mark.parametrize('batch', [1, 3, 40])
def test_few_and_many_streams_of_any_width_equal_the_whole(kind, factor, channels, batch):
    subsampling = subsampling_of(kind, factor, channels)
    lengths = [2 * factor + 1 - row % factor for row in range(batch)]  # they end within a frame
    features = features_of(lengths)
    incremental = IncrementalSubsampling(subsampling)
    caches, padded = incremental.new_stage(batch).caches, torch.nn.functional.pad(features, (0, 0, factor - 1, 0))
    with torch.no_grad():
        whole, counts = subsampling(x=features, lengths=torch.tensor(lengths))
        for frame in range(3):
            begins = torch.full((batch,), True) if frame == 0 else None
            left = torch.tensor([min(max(length - (frame - 1) * factor - 1, 0), factor) for length in lengths])
            ending = left if frame == 2 else None
            found = incremental.step(caches, padded[:, factor * frame :][:, :factor], some(batch), begins, ending)
            exists = frame < counts
            assert_near(found[exists, 0], whole[exists, frame])


def test_other_activations_are_theirs():
    subsampling, features = subsampling_of(activation=torch.nn.SiLU(), channels=256), features_of([9])
    incremental = IncrementalSubsampling(subsampling)
    caches, padded = incremental.new_stage(1).caches, torch.nn.functional.pad(features, (0, 0, 7, 0))
    with torch.no_grad():
        whole, _ = subsampling(x=features, lengths=torch.tensor([9]))
        assert_near(incremental.step(caches, padded[:, :8], some(1), torch.tensor([True])), whole[:, :1])
        assert_near(incremental.step(caches, padded[:, 8:16], some(1)), whole[:, 1:])
