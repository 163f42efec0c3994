# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all. New in this project."""

import glob
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = '.partial'


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path to write to; put the file in place once it is written, and only then.

    The path is beside the target, so that no second file system comes between. The data are on the disk before the
    name changes. Whatever goes wrong, a file that was at the target stays there whole; a process that is killed
    leaves its ``.NAME.PID.partial`` behind, which is cleared when the same file is next written, or by
    :func:`remove_partial_files`.

    Args:
        path: the target, in a folder that is there.

    Raises:
        OSError: naming the target and the cause, if it cannot be written (such as a full disk).
    """
    target = Path(path)
    remove_partial_files(target.parent, target.name)
    partial = target.with_name(f'.{target.name}.{os.getpid()}{PARTIAL_SUFFIX}')
    try:
        yield partial
        _flush_to_disk(partial)
        os.replace(partial, target)
    except OSError as error:
        raise OSError(error.errno, f"could not write {target}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    _flush_to_disk(target.parent)


def remove_partial_files(folder: str | Path, name: str | None = None) -> list[Path]:
    """Remove what killed processes left in a folder, and return it; a running process keeps its own.

    Args:
        folder: where to look.
        name: of the file that was being written; None for any.
    """
    pattern = '*' if name is None else glob.escape(name)
    left = [path for path in Path(folder).glob(f'.{pattern}.*{PARTIAL_SUFFIX}') if not _is_in_use(path)]
    for path in left:
        path.unlink(missing_ok=True)
    return left


def _is_in_use(partial: Path) -> bool:
    process = partial.name.removesuffix(PARTIAL_SUFFIX).rpartition('.')[2]
    if (
        not process.isdigit() or os.name != 'posix'
    ):  # not made by this module; or Windows, where signal 0 ends a process
        return True
    try:
        os.kill(int(process), 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush_to_disk(path: Path) -> None:
    if os.name != 'posix' and path.is_dir():  # only POSIX opens folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == 'posix' else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, contents) -> None:
    """Write JSON, whole or not at all; NaN and infinite numbers become null.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    with replacing(Path(path).resolve()) as partial:
        partial.write_text(json.dumps(_finite(contents), indent=2, allow_nan=False) + '\n', encoding='utf-8')


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
