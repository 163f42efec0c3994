# SPDX-License-Identifier: Apache-2.0
"""The modules of benchmarks/downstream."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / 'benchmarks/downstream'


@pytest.fixture(scope='session')
def load():
    """Return a function that imports a module of the benchmark by its name."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module
