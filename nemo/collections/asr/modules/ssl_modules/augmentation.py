# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``augmentation.py``: one draw divides noise into segments, not one per sample.

NeMo draws a segment for each sample, in Python, and counts them: 8 of the 10 ms that an utterance of 16 s takes to mix.
The counts are multinomial, and stand in the order in which the segments were first drawn; both are drawn at once here.
"""

import random
from typing import NamedTuple

import numpy as np

from nemo_streaming_ssl import upstream

_up = upstream(globals())


class SegmentDraws(NamedTuple):
    """What ``random.choices(range(segments), k=samples)`` stands for, as far as NeMo counts it."""

    segments: int
    samples: int

    def counts(self) -> dict[int, int]:
        """Draw how often each segment was drawn, those first that were drawn first; none that was not."""
        generator = np.random.default_rng(random.getrandbits(64))
        counts = generator.multinomial(self.samples, np.full(self.segments, 1 / self.segments))
        drawn = np.flatnonzero(counts)
        # Given the counts, all orders of the draws are alike: which segment comes first, and which next, goes by them.
        order = generator.choice(drawn, len(drawn), replace=False, p=counts[drawn] / self.samples)
        return {int(segment): int(counts[segment]) for segment in order}


class _Random:
    """Python's ``random`` module, except for the draws that NeMo counts, all made by ``choices``."""

    def __getattr__(self, name: str):
        return getattr(random, name)

    @staticmethod
    def choices(population: range, *, k: int) -> SegmentDraws:
        return SegmentDraws(len(population), k)


_up.random, _up.Counter = _Random(), SegmentDraws.counts  # NeMo's classes find these in their own module's globals
