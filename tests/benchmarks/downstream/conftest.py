# SPDX-License-Identifier: Apache-2.0
"""The modules of benchmarks/downstream, and speech-like noise for them."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

FOLDER = Path(__file__).resolve().parents[3] / 'benchmarks/downstream'
RATE = 16000


@pytest.fixture(scope='session')
def load():
    """Return a function that imports a module of the benchmark by its name."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module


@pytest.fixture(scope='session')
def make_manifest():
    """Return a function that writes noise and a manifest of it."""

    def make(folder, speakers, lengths, phones='AH B K', prefix=''):
        """Write for each speaker an utterance of each length; returns the manifest."""
        folder.mkdir(parents=True, exist_ok=True)
        generator, lines = np.random.default_rng(0), []
        for index, seconds in enumerate(lengths):  # the speakers take turns
            for speaker in speakers:
                name = f'{prefix}{speaker}-{index}.wav'
                samples = 0.1 * generator.standard_normal(int(seconds * RATE))
                soundfile.write(folder / name, samples, RATE)
                entry = {'audio_filepath': name, 'duration': seconds, 'speaker': speaker, 'text': ''}
                lines.append({**entry, **({'phones': phones} if phones else {})})
        path = folder / f'{prefix}manifest.json'
        path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        return path

    return make
