# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``augmentation.py``: noise is divided into segments by one draw, not by one for each sample.

NeMo draws a segment for each of the samples that are to be mixed, in Python, and counts them: 8 of the 10 ms that an
utterance of 16 s takes to mix, and most of what its reading takes. The counts have a multinomial distribution, and stand
in the order in which the segments were first drawn; both are drawn here at once, from the same generator's seed.
"""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nemo_streaming_ssl import upstream

_up = upstream(globals())


class SegmentDraws(Sequence):
    """What ``random.choices(range(segments), k=samples)`` returns, as far as NeMo counts it.

    Args:
        segments: how many there are.
        samples: how many are drawn.
    """

    def __init__(self, segments: int, samples: int):
        self.segments, self.samples = segments, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index):
        raise TypeError("the draws are not made one by one; count them")

    def counts(self) -> dict[int, int]:
        """Draw how often each segment was drawn, those first that were drawn first; none that was not."""
        if self.segments == 1:
            return {0: self.samples}
        generator = np.random.default_rng(random.getrandbits(64))
        counts = generator.multinomial(self.samples, np.full(self.segments, 1 / self.segments))
        drawn = np.flatnonzero(counts)
        # Given the counts, all orders of the draws are alike; so which segment comes first, and which of the others
        # next, goes by their counts.
        order = generator.choice(drawn, len(drawn), replace=False, p=counts[drawn] / self.samples)
        return {int(segment): int(counts[segment]) for segment in order}


class _Random:
    """Python's ``random`` module, but for draws that NeMo only counts."""

    def __getattr__(self, name: str):
        return getattr(random, name)

    @staticmethod
    def choices(population, weights=None, *, cum_weights=None, k=1):
        if isinstance(population, range) and weights is None and cum_weights is None:
            return SegmentDraws(len(population), k)
        return random.choices(population, weights, cum_weights=cum_weights, k=k)


def _count(draws):
    return draws.counts() if isinstance(draws, SegmentDraws) else Counter(draws)


_up.random, _up.Counter = _Random(), _count  # NeMo's classes find these in their own module's globals
