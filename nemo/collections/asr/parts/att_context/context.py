# SPDX-License-Identifier: Apache-2.0
"""The attention context as a value. Imports neither NeMo nor Lightning."""

import random
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

UNLIMITED = -1

PRESETS = {
    'very_low': (80, 0),
    'low': (160, 0),
    'medium': (240, 0),
    'high': (320, 0),
    'unlimited': (UNLIMITED, 0),
}


def shown(value: object) -> str:
    """Return a value as errors show it: in one line, cut where it is long."""
    return textwrap.shorten(repr(value), 200, placeholder=' ...')


def _parse_side(side: str, value: Any, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < UNLIMITED:
        raise ValueError(
            f"{field}: the {side} context is {shown(value)}; it must be a whole number of attention frames, "
            "0 or more, or -1 for unlimited"
        )
    return int(value)


@dataclass(frozen=True)
class AttContext:
    """How far an attention frame sees to either side.

    The unit is the attention frame: one encoder frame after subsampling (80 ms at factor 8). -1 is unlimited.
    """

    left: int
    """Frames seen before the present one."""
    right: int
    """Frames seen after the present one (the look-ahead)."""

    def __post_init__(self) -> None:
        _parse_side('left', self.left, 'AttContext')
        _parse_side('right', self.right, 'AttContext')

    @classmethod
    def parse(cls, value: Any, field: str = 'att_context_size') -> 'AttContext':
        """Read an ``AttContext``, a pair ``[left, right]``, an int (left, with right 0) or a preset's name.

        Raises:
            ValueError: beginning with ``field``, if the value is none of these.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            if value not in PRESETS:
                raise ValueError(f"{field}: no preset is called {value!r}; known are {', '.join(PRESETS)}")
            return cls(*PRESETS[value])
        if isinstance(value, Integral) and not isinstance(value, bool):
            return cls(_parse_side('left', value, field), 0)
        if not isinstance(value, Sequence) or len(value) != 2:
            raise ValueError(
                f"{field}: {shown(value)} is no context; give [left, right] in attention frames, a left context, "
                f"or a preset ({', '.join(PRESETS)})"
            )
        return cls(_parse_side('left', value[0], field), _parse_side('right', value[1], field))

    def __iter__(self) -> Iterator[int]:
        yield self.left
        yield self.right

    def __len__(self) -> int:
        return 2  # torch.compile reads it before it unpacks

    def as_list(self) -> list[int]:
        """NeMo's form, ``[left, right]``."""
        return [self.left, self.right]

    def intersect(self, other: 'AttContext') -> 'AttContext':
        """Return what is visible in both contexts."""
        return AttContext(tightest(self.left, other.left), tightest(self.right, other.right))


def is_sequence(value: object) -> bool:
    """Return whether it is a list, a tuple or the like of a config, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def context_label(context: Iterable[int]) -> str:
    """Return a context's name in metrics, files and tables: ``40_0``, ``unlimited_0``."""
    return '_'.join('unlimited' if side == UNLIMITED else str(side) for side in context)


def tightest(*sides: int) -> int:
    """Return the smallest limited one of one-sided contexts in attention frames; -1 if none limits."""
    limited = [side for side in sides if side != UNLIMITED]
    return min(limited) if limited else UNLIMITED


def is_distribution(value: Any, number: int) -> bool:
    """Return whether it is a list of so many probabilities, with the sum 1 but for rounding."""
    in_range = is_sequence(value) and all(isinstance(each, Real) and 0 <= float(each) <= 1 for each in value)
    return in_range and len(value) == number and abs(sum(value) - 1) <= 1e-6


def draw_index(seed: int, step: int | str, probabilities: Sequence[float]) -> int:
    """Draw an index by probabilities, as a pure function of (seed, step) without a global generator."""
    generator = random.Random(f'{seed}:{step}')  # a text seed is hashed alike on every platform and Python
    return generator.choices(range(len(probabilities)), weights=probabilities)[0]
