# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""The example scripts as modules."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[4] / "examples/asr/speech_pretraining"


@pytest.fixture(scope="session")
def load_example():
    """Return a function that imports an example script by its name, without ``.py``; they import each other."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))

    def load(name):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
            sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses and pickle look it up there
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    return load
