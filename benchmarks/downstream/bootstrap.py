# SPDX-License-Identifier: Apache-2.0
"""Phone error rates and their differences, with intervals from a bootstrap over utterances and seeds.

Shapes: S seeds, U utterances, N resamples.

Seeds and utterances are resampled independently of each other. Two arms that are compared use the same draws, so the
difference does not contain the difficulty of an utterance or the luck of a shared seed.
"""

import functools
from typing import NamedTuple

import numpy as np

RESAMPLES = 5000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A value, and the interval about it."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """-1 or 1 if the interval is on one side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def error_rate(errors: np.ndarray, phones: np.ndarray) -> float:
    """Return errors in a phone: of errors [S, U] in utterances with so many phones [U]."""
    return float(errors.sum() / (errors.shape[0] * phones.sum()))


def estimate(
    errors: np.ndarray,
    phones: np.ndarray,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Return the error rate of errors [S, U], or a difference of rates for differences of errors.

    Args:
        errors: of each seed in each utterance.
        phones: how many each utterance has, [U].
        groups: what is drawn instead of utterances, such as the speaker of each [U].
        resamples: how often both are drawn anew.
        confidence: of the percentile interval.
        seed: of the draws.

    Raises:
        ValueError: if the shapes do not fit, or there is nothing.
    """
    errors, phones = np.asarray(errors, dtype=float), np.asarray(phones, dtype=float)
    if errors.ndim != 2 or errors.shape[1] != len(phones) or 0 in errors.shape:
        raise ValueError(f"errors is {errors.shape} for {len(phones)} utterances; it must be [seeds, utterances]")
    if groups is not None:
        errors, phones = _summed(errors, groups), _summed(phones[None], groups)[0]
    seeds, utterances = errors.shape
    seed_counts, utterance_counts = _draws(seeds, utterances, resamples, seed)
    found = ((seed_counts @ errors) * utterance_counts).sum(axis=1) / (seeds * (utterance_counts @ phones))
    tail = (1 - confidence) / 2
    return Estimate(error_rate(errors, phones), *map(float, np.quantile(found, [tail, 1 - tail])))


@functools.lru_cache(maxsize=8)  # a report uses the same ones hundreds of times
def _draws(seeds: int, utterances: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each seed [N, S] and each utterance [N, U] is in each resample, as floats."""
    generator = np.random.default_rng(seed)
    counts = (generator.multinomial(size, np.full(size, 1 / size), resamples) for size in (seeds, utterances))
    return tuple(count.astype(float) for count in counts)


def _summed(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Add up the columns of values [S, U] that belong to one group."""
    names, places = np.unique(np.asarray(groups), return_inverse=True)
    return values @ np.eye(len(names))[places]
