# SPDX-License-Identifier: Apache-2.0
"""The example scripts as modules."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

EXAMPLES = Path(__file__).resolve().parents[4] / "examples/asr/speech_pretraining"


@pytest.fixture(scope="session")
def load_example():
    """Return a function that imports an example script by its name, without ``.py``; scripts import their tools."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))

    def load(name):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
            sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses and pickle look it up there
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    return load


@pytest.fixture(scope="session")
def audio_folder(tmp_path_factory):
    """A folder of noise: good files of several rates and channels, and bad ones."""
    folder = tmp_path_factory.mktemp("audio")
    soundfile.write(folder / "mono.wav", _noise(1.0), 16000)
    soundfile.write(folder / "stereo.flac", _noise(0.7, channels=2, rate=22050), 22050)
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "silent.wav", _noise(0), 16000)
    (folder / "text.wav").write_text("this is no audio")
    (folder / "cut.wav").write_bytes((folder / "mono.wav").read_bytes()[:9000])
    (folder / "cut.flac").write_bytes((folder / "stereo.flac").read_bytes()[:9000])
    broken = _noise(0.1)
    broken[5] = np.nan
    soundfile.write(folder / "broken.wav", broken, 16000, subtype="FLOAT")
    return folder


def _noise(seconds, channels=1, rate=16000):
    samples = np.random.default_rng(0).standard_normal((int(seconds * rate), channels)) * 0.1
    return samples.astype(np.float32)
