# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
import json

import numpy as np
import pytest
import soundfile

from nemo.collections.asr.data import ssl_dataset


class CountingArray(np.ndarray):
    """An array that counts how often Python iterates over it."""

    iterations = 0

    def __iter__(self):
        CountingArray.iterations += 1
        return super().__iter__()


@pytest.mark.unit
def test_noise_is_loaded_without_a_python_loop_over_its_samples(tmp_path, monkeypatch):
    soundfile.write(tmp_path / 'noise.wav', np.full(16000, 0.25), 16000)
    load = ssl_dataset._up.AudioSegment.from_file

    def counting(*args, **kwargs):
        segment = load(*args, **kwargs)
        segment._samples = segment.samples.view(CountingArray)
        return segment

    monkeypatch.setattr(ssl_dataset._up.AudioSegment, 'from_file', counting)
    sample = {'audio_filepath': str(tmp_path / 'noise.wav'), 'duration': 1.0}
    noise, length = ssl_dataset.load_noise_audio(sample, 16000, max_audio_len=20000)
    assert noise.shape == (20000,) and int(length) == 16000 or int(length) == 20000
    assert noise[:16000].mean().item() == pytest.approx(0.25, abs=1e-3)
    assert CountingArray.iterations == 0


@pytest.mark.unit
def test_a_manifest_of_noise_is_read_as_before(tmp_path):
    soundfile.write(tmp_path / 'noise.wav', np.full(8000, 0.1), 16000)
    (tmp_path / 'noise.json').write_text(json.dumps({'audio_filepath': 'noise.wav', 'duration': 0.5}))
    noise_data = ssl_dataset.load_noise_manifest(str(tmp_path / 'noise.json'))
    noise, _ = ssl_dataset.sample_noise(noise_data, 16000, max_audio_len=4000)
    assert noise.shape == (4000,) and noise.mean().item() == pytest.approx(0.1, abs=1e-3)
