# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Subsampling frame by frame gives what NeMo's gives of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo.collections.asr.parts.streaming.subsampling import IncrementalSubsampling
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling

FEATURES, WIDTH = 20, 12


def subsampling_of(kind: str, factor: int) -> ConvSubsampling:
    torch.manual_seed(0)
    return ConvSubsampling(kind, factor, FEATURES, WIDTH, conv_channels=6, is_causal=True).eval()


@torch.no_grad()
def in_steps(incremental, features: torch.Tensor, lengths: list[int], sizes: list[int]) -> torch.Tensor:
    """Give ragged utterances [B, T, F] some frames at a time."""
    caches, factor, frame, parts = incremental.new_caches(len(features)), incremental.factor, 0, []
    frames = max(max(length - 2, -1) // factor + 2 for length in lengths)
    total = torch.tensor(lengths)
    while frame < frames:
        count = sizes[len(parts) % len(sizes)]
        first = factor * (frame - 1) + 1
        places = torch.arange(first, first + factor * count)
        there = (places >= 0) & (places < total[:, None])
        piece = features[:, places.clamp(0, features.shape[1] - 1)] * there.unsqueeze(2)
        begins = torch.full((len(features),), frame == 0)
        left = (total - first).clamp(0, factor * count)
        parts.append(incremental.step(caches, piece, None, begins if frame == 0 else None, left))
        frame += count
    return torch.cat(parts, dim=1)


@pytest.mark.unit
@settings(max_examples=20)
@given(
    st.sampled_from(['dw_striding', 'striding']),
    st.sampled_from([2, 4, 8]),
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_any_steps_of_ragged_utterances_equal_the_whole(kind, factor, lengths, sizes):
    subsampling = subsampling_of(kind, factor)
    features = torch.randn(len(lengths), max(max(lengths), 1), FEATURES, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, counts = subsampling(x=features, lengths=torch.tensor(lengths))
    found = in_steps(IncrementalSubsampling(subsampling), features, lengths, sizes)
    for row, count in enumerate(counts.tolist()):
        torch.testing.assert_close(found[row, :count], whole[row, :count], atol=1e-5, rtol=0)


@pytest.mark.unit
def test_many_rows_and_large_ones_are_no_different():
    subsampling = subsampling_of('dw_striding', 8)
    incremental, features = IncrementalSubsampling(subsampling), torch.randn(40, 33, FEATURES)
    caches = incremental.new_caches(40)
    padded = torch.nn.functional.pad(features, (0, 0, 7, 0))
    with torch.no_grad():
        whole, _ = subsampling(x=features, lengths=torch.full((40,), 33))
        for frame in range(5):
            begins = torch.full((40,), True) if frame == 0 else None
            found = incremental.step(caches, padded[:, 8 * frame : 8 * frame + 8], None, begins)
            torch.testing.assert_close(found[:, 0], whole[:, frame], atol=1e-5, rtol=0)


@pytest.mark.unit
def test_rows_that_are_left_out_keep_their_place():
    subsampling = subsampling_of('striding', 4)
    incremental, features = IncrementalSubsampling(subsampling), torch.randn(3, 16, FEATURES)
    together, apart = incremental.new_caches(3), incremental.new_caches(3)
    with torch.no_grad():
        for frame in range(4):
            piece = features[:, 4 * frame : 4 * frame + 4]
            expected = incremental.step(together, piece, None)
            for rows in (torch.tensor([2]), torch.tensor([0, 1])):
                found = incremental.step(apart, piece[rows], rows)
                torch.testing.assert_close(found, expected[rows], atol=1e-6, rtol=0)
