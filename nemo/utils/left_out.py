# SPDX-License-Identifier: Apache-2.0
"""Count the utterances that are left out, in a rank and in all its data workers. New in this project."""

import atexit
import json
import os
import tempfile
import uuid
from pathlib import Path

OUTSIDE_LIMITS = 'outside of min_duration and max_duration'


class LeftOut:
    """Counts utterances by reason, in a file that all processes of a rank append to.

    Forked workers inherit the path. Spawned workers get it with any object that holds the counter. The process that made the
    counter removes the file.
    """

    def __init__(self):
        self.path = os.path.join(tempfile.gettempdir(), f'nemo-left-out-{uuid.uuid4().hex}')
        self._owner = os.getpid()

    def add(self, reason: str, first: str, count: int = 1) -> None:
        """Count utterances; ``first`` names one of them: its file, and the shard and member if it has them."""
        if count > 0:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps([reason, str(first), count]) + '\n')

    def reasons(self) -> dict[str, tuple[int, str]]:
        """Return for each reason how many utterances were left out so far, and the first of them."""
        found: dict[str, tuple[int, str]] = {}
        lines = Path(self.path).read_text(encoding='utf-8').splitlines() if os.path.exists(self.path) else []
        for reason, first, count in map(json.loads, lines):
            before, first = found.get(reason, (0, first))
            found[reason] = before + count, first
        return found

    def total(self) -> int:
        """Return how many utterances were left out."""
        return sum(count for count, _ in self.reasons().values())

    def summary(self) -> str:
        """Return a line for the log."""
        reasons = self.reasons()
        parts = [f'{count} {reason} (first: {first})' for reason, (count, first) in reasons.items()]
        total = sum(count for count, _ in reasons.values())
        return f"{total} utterances were left out: {'; '.join(parts)}" if parts else 'no utterance was left out'

    def clear(self) -> None:
        """Clear the counts."""
        if self._owner == os.getpid():
            Path(self.path).unlink(missing_ok=True)

    def __reduce__(self):
        return _adopt, (self.path,)


def _adopt(path: str) -> LeftOut:
    LEFT_OUT.path, LEFT_OUT._owner = path, None
    return LEFT_OUT


LEFT_OUT = LeftOut()
"""The counter of this rank."""
atexit.register(LEFT_OUT.clear)
