# SPDX-License-Identifier: Apache-2.0
"""The example scripts as modules."""

import functools
from pathlib import Path

import numpy as np
import pytest
import soundfile
from load_script import load_script

EXAMPLES = Path(__file__).resolve().parents[4] / "examples/asr/speech_pretraining"


@pytest.fixture(scope="session")
def load_example():
    """Return a function that imports an example script by its name, without ``.py``."""
    return functools.cache(lambda name: load_script(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="session")
def audio_folder(tmp_path_factory):
    """A folder of noise: a good file and bad ones."""
    folder = tmp_path_factory.mktemp("audio")
    soundfile.write(folder / "mono.wav", np.random.default_rng(0).standard_normal(16000) * 0.1, 16000)
    (folder / "text.wav").write_text("this is no audio")
    (folder / "cut.wav").write_bytes((folder / "mono.wav").read_bytes()[:9000])
    return folder
