# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all. New in this project."""

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = '.partial'


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside the target to write to; once the data are on the disk, put the file in place.

    Else a file that was there stays whole. A process that is killed leaves its ``.NAME.PID.partial`` behind, which is
    removed when the same file is next written.

    Raises:
        OSError: naming the target and the cause, if it cannot be written (such as a full disk).
    """
    target = Path(path)
    remove_partial_files(target.parent, glob.escape(target.name))
    partial = target.with_name(f'.{target.name}.{os.getpid()}{PARTIAL_SUFFIX}')
    try:
        yield partial
        with open(partial, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise OSError(error.errno, f"could not write {target}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: str | Path, pattern: str = '*') -> list[Path]:
    """Remove what killed processes left of files in a folder, and return it; running ones keep their own."""
    left = [path for path in Path(folder).glob(f'.{pattern}.*{PARTIAL_SUFFIX}') if not _is_in_use(path)]
    for path in left:
        path.unlink(missing_ok=True)
    return left


def _is_in_use(partial: Path) -> bool:
    process = partial.stem.rpartition('.')[2]
    try:
        if process.isdigit() and os.name == 'posix':  # made here; on Windows signal 0 ends a process
            os.kill(int(process), 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all. Errors are those of :func:`replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding='utf-8')


def write_json(path: str | Path, contents) -> None:
    """Write JSON, atomically, with null for non-finite numbers; errors are those of :func:`replacing`."""
    finite = json.loads(json.dumps(contents), parse_constant=lambda name: None)
    write_text(Path(path).resolve(), json.dumps(finite, indent=2) + '\n')
