# SPDX-License-Identifier: Apache-2.0
"""Places and durations of a manifest's entries, as kept in memory. New in this project.

A million entries as Python objects take most of a gigabyte in each process. Here 16 bytes of each are kept. The index of a
large manifest is left in the temporary folder for the other ranks of the machine and the next start.

Shapes: E entries.
"""

import getpass
import hashlib
import math
import os
import tempfile
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from nemo.collections.common.data.lhotse.nemo_adapters import ManifestLines, parsed
from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths as expanded
from nemo.utils import logging
from nemo.utils.atomic_files import replacing

SHARED_FROM = 10_000_000  # bytes; a manifest of this size is read in a fifth of a second


class Line(NamedTuple):
    """An entry, with its manifest and the number of its line."""

    manifest: str
    number: int
    entry: dict

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f'{self.manifest}, line {self.number}'

    @property
    def audio(self) -> str | list[str]:
        """The audio of the entry, under either of NeMo's names; ValueError if it has neither."""
        audio = self.entry.get('audio_filepath', self.entry.get('audio_filename'))
        if not isinstance(audio, (str, list)) or not audio:
            raise ValueError(f"{self.place} has no audio_filepath")
        return audio


def is_remote(path: str) -> bool:
    """Whether a path is not one of this machine: of a data store, a URL, or a command to read from."""
    return '://' in path or path.startswith('pipe:')


def paths_in(value) -> list[str]:
    """Return the paths in a value: a string with commas, a list, a list of lists, pairs with weights."""
    if value is None:
        return []
    if isinstance(value, (str, Path)):
        return str(value).split(',')
    return [path for entry in value if not isinstance(entry, (int, float)) for path in paths_in(entry)]


def read_entries(pattern: str | Path, needed: tuple[str, ...] = ()) -> Iterator[Line]:
    """Read manifests matching a pattern, as lhotse does, compressed or not; entries need some keys.

    ValueError names manifest and line, if a manifest cannot be read, has no entries, or a line is no entry.
    """
    for path in expanded(os.path.expanduser(pattern)):
        number, lines = 0, ManifestLines(path)
        lines.needed = needed
        for number, entry in lines.numbered():
            yield Line(path, number, entry)
        if not number:
            raise ValueError(f"manifest {path} has no entries")


def local_entries(value) -> Iterator[Line]:
    """Read the local manifests among :func:`paths_in` a value; others are left to their reader."""
    for path in paths_in(value):
        if not is_remote(path):
            yield from read_entries(path)


class ManifestIndex:
    """Where the entries of a manifest begin, int64 [E] bytes, and their durations, float64 [E] s or NaN.

    Blank lines count as nothing. ValueError names file and line, if a line is no entry.
    """

    def __init__(self, path: str):
        self.path = path
        self._stamp = _stamp(os.stat(path))
        is_large = self._stamp[1] >= SHARED_FROM
        self.starts, self.durations = self._read_once_on_this_machine() if is_large else self._read()

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        starts, durations, position = array('q'), array('d'), 0
        with open(self.path, 'rb') as lines:
            for number, text in enumerate(lines, 1):
                start, position = position, position + len(text)
                if text.isspace():
                    continue
                entry = parsed(text, self.path, number)
                if Line(self.path, number, entry).audio:
                    starts.append(start)
                    durations.append(math.nan if entry.get('duration') is None else entry['duration'])
        return np.frombuffer(starts, np.int64), np.frombuffer(durations, np.float64)

    def _read_once_on_this_machine(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what ``_read`` does, memory-mapped from the file of another process, or write that file."""
        name = hashlib.sha256(os.path.realpath(self.path).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f'nemo-manifest-index-{getpass.getuser()}'
        kept = folder / f"{name}-{'-'.join(map(str, self._stamp))}.npy"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            with FileLock(folder / 'lock'):  # the ranks of a machine start at the same time: one reads
                if not kept.exists():
                    found = np.stack([column.view(np.int64) for column in self._read()])
                    for older in folder.glob(f'{name}-*'):
                        older.unlink()
                    with replacing(kept) as partial, open(partial, 'wb') as file:
                        np.save(file, found)
                starts, durations = np.load(kept, mmap_mode='r')
            return starts, durations.view(np.float64)
        except OSError as error:  # no such folder may be made, or the disk is full
            logging.warning(f"Each process reads {self.path} again: {error}")
            return self._read()

    def __len__(self) -> int:
        return len(self.starts)

    def lasting(self, min_duration: float | None = None, max_duration: float | None = None) -> np.ndarray:
        """Return which entries last from so many seconds to so many, bool [E]; those without a duration do."""
        too_short = self.durations < (-np.inf if min_duration is None else min_duration)  # NaN is neither
        return ~too_short & ~(self.durations > (np.inf if max_duration is None else max_duration))

    def line(self, index: int) -> str:
        """Return the text of an entry; ValueError if the file was changed since it was read."""
        with open(self.path, 'rb') as file:  # processes would share the place in a file that stays open
            if _stamp(os.fstat(file.fileno())) != self._stamp:
                raise ValueError(f"{self.path} was changed while it is in use; write it under a new name")
            file.seek(int(self.starts[index]))
            return file.readline().decode().strip()


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, status.st_size


def index_of(path: str) -> ManifestIndex:
    """Return the index of a manifest, which is read once in a process as long as the file stays as it is."""
    return _index_of(path, _stamp(os.stat(path)))


@lru_cache(maxsize=64)
def _index_of(path: str, stamp: tuple[int, int]) -> ManifestIndex:  # the stamp is part of the key
    return ManifestIndex(path)
