# SPDX-License-Identifier: Apache-2.0
"""Count the utterances that are left out, in a rank and in all its data workers. New in this project."""

import atexit
import json
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Reason(NamedTuple):
    """How many utterances were left out for a reason, and the first of them."""

    count: int
    first: str


class LeftOut:
    """Counts utterances by reason, in a file that all processes of a rank append to.

    Forked workers inherit the path. Spawned workers get it with any object that holds the counter.

    Args:
        path: of the file; it is made with the first count, and removed with the process that made the counter.
    """

    def __init__(self, path: str | None = None):
        self.path = path or os.path.join(tempfile.gettempdir(), f'nemo-left-out-{uuid.uuid4().hex}')
        self._owner = os.getpid()

    def add(self, reason: str, first: str, count: int = 1) -> None:
        """Count utterances; ``first`` names one of them: its file, and the shard and member if it has them."""
        if count:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps([reason, str(first), count]) + '\n')

    def reasons(self) -> dict[str, Reason]:
        """Return what was counted so far."""
        found: dict[str, Reason] = {}
        if os.path.exists(self.path):
            with open(self.path, encoding='utf-8') as lines:
                for reason, first, count in map(json.loads, lines):
                    before = found.get(reason, Reason(0, first))
                    found[reason] = Reason(before.count + count, before.first)
        return found

    def total(self) -> int:
        """Return how many utterances were left out."""
        return sum(reason.count for reason in self.reasons().values())

    def summary(self) -> str:
        """Return a line for the log."""
        return describe(self.reasons())

    def clear(self) -> None:
        """Clear the counts."""
        if self._owner == os.getpid():
            Path(self.path).unlink(missing_ok=True)

    def __reduce__(self):
        return _adopt, (self.path,)


def describe(reasons: Mapping[str, Reason]) -> str:
    """Return counts by reason as a sentence."""
    if not reasons:
        return 'no utterance was left out'
    parts = [f'{found.count} {reason} (first: {found.first})' for reason, found in reasons.items()]
    return f"{sum(found.count for found in reasons.values())} utterances were left out: {'; '.join(parts)}"


def _adopt(path: str) -> LeftOut:
    LEFT_OUT.path, LEFT_OUT._owner = path, None  # the process that made the file removes it
    return LEFT_OUT


LEFT_OUT = LeftOut()
"""The counter of this rank."""
atexit.register(LEFT_OUT.clear)
