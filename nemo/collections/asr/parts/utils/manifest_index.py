# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Where the entries of a manifest stand, and how long they last: what is kept of it in memory. New in this project.

A million entries as Python objects take most of a gigabyte in each process. Here a manifest is read once, in one pass, which
finds mistakes too; 16 bytes of each entry are kept, and the file itself is mapped into memory, where all workers and
ranks of a machine share it.
"""

import json
import mmap
import os
from array import array
from functools import lru_cache
from typing import NamedTuple, Optional

import numpy as np

FIRST = 100  # entries that are kept as they are, to look at


class NumberedEntry(NamedTuple):
    """An entry of a manifest, and the number of its line."""

    line: int
    entry: dict


class ManifestIndex:
    """The entries of a manifest.

    Args:
        path: of a NeMo manifest, one JSON object a line; blank lines count as nothing.

    Attributes:
        starts: int64 [E], where each entry begins, in bytes.
        durations: float64 [E], in seconds; NaN where the manifest says none.
        first: the first entries.

    Raises:
        ValueError: naming file and line, if there is a line that is no JSON object or has a duration that is no number.
        OSError: if the file cannot be read.
    """

    def __init__(self, path: str):
        self.path, self.first = path, []
        starts, durations = array('q'), array('d')
        self._open()
        position, number = 0, 0
        for line in iter(self._content.readline, b''):
            number += 1
            if not line.isspace():
                entry = self._parsed(line, number)
                starts.append(position)
                durations.append(_seconds(entry.get('duration'), path, number))
                if len(self.first) < FIRST:
                    self.first.append(NumberedEntry(number, entry))
            position += len(line)
        if hasattr(mmap, 'MADV_DONTNEED') and starts:
            self._content.madvise(mmap.MADV_DONTNEED)  # the system keeps the file at hand, but not for this process
        self.starts, self.durations = np.frombuffer(starts, np.int64), np.frombuffer(durations, np.float64)

    def _open(self) -> None:
        self._file = open(self.path, 'rb')
        self._stamp = _stamp(os.fstat(self._file.fileno()))
        empty = self._stamp[1] == 0  # which cannot be mapped
        self._content = self._file if empty else mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def _parsed(self, line: bytes, number: int) -> dict:
        try:
            entry = json.loads(line.decode())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}, line {number} is no JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{self.path}, line {number} is no JSON object")
        return entry

    def __len__(self) -> int:
        return len(self.starts)

    def lasting(self, min_duration: Optional[float] = None, max_duration: Optional[float] = None) -> np.ndarray:
        """Return which entries last from so many seconds to so many, bool [E]; those without a duration do."""
        too_short = self.durations < (-np.inf if min_duration is None else min_duration)  # NaN is neither
        too_long = self.durations > (np.inf if max_duration is None else max_duration)
        return ~too_short & ~too_long

    def line(self, index: int) -> str:
        """Return the text of an entry.

        Raises:
            ValueError: if the file was changed since it was read.
        """
        if _stamp(os.fstat(self._file.fileno())) != self._stamp:
            raise ValueError(f"{self.path} was changed while it is in use; write a changed manifest under a new name")
        start = int(self.starts[index])
        end = self._content.find(b'\n', start)
        return self._content[start : end if end >= 0 else len(self._content)].decode().strip()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ('_file', '_content')}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()
        self._stamp = state['_stamp']


def _seconds(duration, path: str, number: int) -> float:
    if duration is None:
        return float('nan')
    if not isinstance(duration, (int, float)):
        raise ValueError(f"{path}, line {number}: duration is {duration!r}; it must be a number of seconds")
    return float(duration)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, status.st_size


def index_of(path: str) -> ManifestIndex:
    """Return the index of a manifest; as long as the file stays as it is, it is read once in a process.

    Raises:
        ValueError: see :class:`ManifestIndex`.
        OSError: if the file cannot be read.
    """
    return _index_of(path, _stamp(os.stat(path)))


@lru_cache(maxsize=64)
def _index_of(path: str, stamp: tuple[int, int]) -> ManifestIndex:  # noqa: the stamp is part of the key
    return ManifestIndex(path)
