# SPDX-License-Identifier: Apache-2.0
"""Where the entries of a manifest stand, and how long they last: what is kept of it in memory. New in this project.

A million entries as Python objects take most of a gigabyte in each process. Here a manifest is read once, in one pass, which
finds mistakes too; 16 bytes of each entry are kept, and the file itself is mapped into memory, where all workers and
ranks of a machine share it. Of a large manifest what was found is left in a file of the temporary folder, where the other
ranks of the machine, and the next start, find it.
"""

import getpass
import hashlib
import itertools
import json
import mmap
import os
import tempfile
from array import array
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lhotse.serialization import open_best

from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths
from nemo.utils import logging
from nemo.utils.atomic_files import replacing
from nemo.utils.data_utils import is_datastore_path

try:
    import fcntl
except ImportError:  # Windows: each process reads a manifest for itself
    fcntl = None

FIRST = 100  # entries that are kept as they are, to look at
SHARED_FROM = 10_000_000  # bytes; a manifest of this size is read in a fifth of a second


class NumberedEntry(NamedTuple):
    """An entry of a manifest, and the number of its line."""

    line: int
    entry: dict


class Line(NamedTuple):
    """An entry, with the manifest it is in."""

    manifest: str
    number: int
    entry: dict


def is_remote(path: str) -> bool:
    """Whether a path is not one of this machine: of a data store, a URL, or a command to read from."""
    return is_datastore_path(path) or '://' in path or path.startswith('pipe:')


def expanded(path: str) -> list[str]:
    """Return the files that a path with braces or ``_OP_`` and ``_CL_`` stands for, as NeMo expands it."""
    return expand_sharded_filepaths(path)


def read_entries(pattern: str | Path) -> Iterator[Line]:
    """Read manifests as lhotse does, compressed or not; the paths of audio files become absolute.

    Args:
        pattern: of one manifest, or of several with braces.

    Raises:
        ValueError: naming manifest and line, if a manifest cannot be read, has no entries, or a line is no entry.
    """
    for path in expanded(os.path.expanduser(pattern)):
        line = None
        try:
            for number, text in _numbered_lines(path):
                line = Line(path, number, _parsed(text, path, number))
                yield line
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"manifest {path} cannot be read: {error}") from error
        if line is None:
            raise ValueError(f"manifest {path} has no entries")


def ends_of(path: str) -> list[NumberedEntry]:
    """Return the first and the last entry of a manifest, compressed or not.

    Raises:
        ValueError: naming manifest and line, if one of them is no JSON object.
    """
    lines = list(itertools.islice(_numbered_lines(path), 1))
    lines += deque(_numbered_lines(path), maxlen=1)
    return [NumberedEntry(number, _parsed(text, path, number)) for number, text in lines]


def _numbered_lines(path: str) -> Iterator[tuple[int, str]]:
    with open_best(os.path.expanduser(path)) as lines:
        for number, text in enumerate(lines, 1):
            if not text.isspace():
                yield number, text


def _parsed(line: bytes | str, path: str, number: int) -> dict:
    try:
        entry = json.loads(line if isinstance(line, str) else line.decode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{path}, line {number} is no JSON object")
    return entry


class ManifestIndex:
    """The entries of a manifest.

    Args:
        path: of a NeMo manifest, one JSON object a line; blank lines count as nothing.

    Attributes:
        starts: int64 [E], where each entry begins, in bytes.
        durations: float64 [E], in seconds; NaN where the manifest has none.
        first: the first entries.

    Raises:
        ValueError: naming file and line, if there is a line that is no JSON object or has a duration that is not a number.
        OSError: if the file cannot be read.
    """

    def __init__(self, path: str):
        self.path = path
        self._open()
        if self._stamp[1] < SHARED_FROM or fcntl is None:
            self.starts, self.durations = self._read()
        else:
            self.starts, self.durations = _once_on_this_machine(path, self._stamp, self._read)
        self.first = [NumberedEntry(*place[1:]) for place in itertools.islice(self._places(), FIRST)]
        if hasattr(mmap, 'MADV_DONTNEED') and len(self.starts):
            self._content.madvise(mmap.MADV_DONTNEED)  # the system keeps the file at hand, but not for this process

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """Read the whole file; return where entries begin and how long they last."""
        starts, durations = array('q'), array('d')
        for position, number, entry in self._places():
            starts.append(position)
            durations.append(_seconds(entry.get('duration'), self.path, number))
        return np.frombuffer(starts, np.int64), np.frombuffer(durations, np.float64)

    def _places(self) -> Iterator[tuple[int, int, dict]]:
        """Yield where each entry begins, the number of its line, and the entry."""
        self._content.seek(0)
        position = 0
        for number, line in enumerate(iter(self._content.readline, b''), 1):
            if not line.isspace():
                yield position, number, _parsed(line, self.path, number)
            position += len(line)

    def _open(self) -> None:
        self._file = open(self.path, 'rb')
        self._stamp = _stamp(os.fstat(self._file.fileno()))
        empty = self._stamp[1] == 0  # which cannot be mapped
        self._content = self._file if empty else mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.starts)

    def lasting(self, min_duration: float | None = None, max_duration: float | None = None) -> np.ndarray:
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


def _once_on_this_machine(path: str, stamp: tuple[int, int], read) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``read`` does, from a file that another process has left, or leave it there; mapped into memory."""
    kept = _shared_file(path, stamp)
    try:
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        with open(kept.parent / 'lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of a machine start at the same time: one reads
            if not kept.exists():
                found = np.stack([column.view(np.int64) for column in read()])
                for older in kept.parent.glob(f"{kept.name.partition('-')[0]}-*"):
                    older.unlink()
                with replacing(kept) as partial, open(partial, 'wb') as file:
                    np.save(file, found)
            starts, durations = np.load(kept, mmap_mode='r')
        return starts, durations.view(np.float64)
    except OSError as error:  # no such folder may be made, or the disk is full
        logging.warning(f"Each process reads {path} for itself: {error}")
        return read()


def _shared_file(path: str, stamp: tuple[int, int]) -> Path:
    """Return where the index of a manifest is left: below a folder of this user, named after file, time and size."""
    name = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f'nemo-manifest-index-{getpass.getuser()}'
    return folder / f"{name}-{'-'.join(map(str, stamp))}.npy"


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
