# SPDX-License-Identifier: Apache-2.0
"""The CSV files of the results, which several processes may append to at a time."""

import csv
import fcntl
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def rows_of(path: Path) -> list[dict]:
    """Return the rows of a CSV file, gzipped or not; none where there is no file."""
    if not path.exists():
        return []
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', newline='') as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: tuple, rows: list[tuple]) -> None:
    """Append rows to a CSV file, with a head if it is new; missing last columns stay empty."""
    with locked(path.with_suffix('.lock'), wait=True):
        new = not path.exists()
        with open(path, 'a', newline='') as file:
            whole = [(*row, *[''] * (len(columns) - len(row))) for row in rows]
            csv.writer(file, lineterminator='\n').writerows([columns] * new + whole)
    path.with_suffix('.lock').unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock on a file in the block; False if another process holds it and ``wait`` is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def label_of(context) -> str:
    """Return the name of a context in the CSV files: ``5 0``."""
    return ' '.join(map(str, context))
