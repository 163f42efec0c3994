# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Ragged streams of noise, cut in any way, for the tests of live streaming."""

import torch
from hypothesis import strategies as st
from tiny_nest import SAMPLE_RATE

from nemo.collections.asr.parts.streaming.session import StreamingOutput

PIECES = st.lists(st.one_of(st.integers(1, 400), st.integers(1, 6000), st.integers(1, 200000)), min_size=1, max_size=5)
TOTALS = st.one_of(st.integers(0, 2000), st.integers(0, 3 * SAMPLE_RATE))


def noise(*shape, seed=0):
    """Noise whose colour and level change, so that frames differ."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(shape[0], shape[1] // 1500 + 1, generator=generator).repeat_interleave(1500, dim=1)
    return torch.randn(*shape, generator=generator) * 0.3 * level[:, : shape[1]] ** 3


def stream(session, samples, lengths, sizes) -> StreamingOutput:
    """Feed ragged streams in pieces of these sizes, in turn; each ends with its last samples, or later."""
    position, outputs, index = 0, [], 0
    while position < max(lengths):
        size = sizes[index % len(sizes)]
        counts = [max(min(length - position, size), 0) for length in lengths]
        ended = [index % 2 == 0 and 0 <= length - position <= size for length in lengths]
        outputs.append(session.step(samples[:, position : position + size], counts, ended))
        position, index = position + size, index + 1
    return StreamingOutput.concatenate(outputs + ([] if all(session.ended) else [session.finish()]))
