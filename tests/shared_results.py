# SPDX-License-Identifier: Apache-2.0
"""Results that are made once in a test run, whichever worker of pytest-xdist asks first."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that ``make(folder)`` has filled; the other workers wait, and find it there.

    Args:
        tmp_path_factory: pytest's fixture.
        name: of the folder; one name for each thing made.
        make: fills the empty folder that it is given. If it fails, the next to ask starts afresh.

    Returns:
        The folder, which the tests must leave as it is.
    """
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        root = root.parent  # each worker has a folder of its own in it
    folder, done = root / name, root / f'{name}.done'
    with open(f'{folder}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
