# SPDX-License-Identifier: Apache-2.0
"""Audio files are read as mono samples, or are named with what is wrong with them."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo.collections.asr.data.audio_files import audio_entries, read_audio, read_entry

RATE = 16000


@pytest.fixture(scope="module")
def audio_folder(tmp_path_factory):
    """A folder of noise: good files of several rates and channels, and bad ones."""
    folder = tmp_path_factory.mktemp("audio")
    noise = np.random.default_rng(0).standard_normal((16000, 2)).astype(np.float32) * 0.1
    soundfile.write(folder / "mono.wav", noise[:, :1], 16000)
    soundfile.write(folder / "stereo.flac", noise[: int(0.7 * 22050)], 22050)
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "silent.wav", noise[:0], 16000)
    (folder / "text.wav").write_text("this is no audio")
    (folder / "cut.wav").write_bytes((folder / "mono.wav").read_bytes()[:9000])
    (folder / "cut.flac").write_bytes((folder / "stereo.flac").read_bytes()[:9000])
    broken = noise[:1600].copy()
    broken[5] = np.nan
    soundfile.write(folder / "broken.wav", broken, 16000, subtype="FLOAT")
    return folder


def test_reading_mixes_down_and_resamples(audio_folder):
    assert read_audio(audio_folder / 'mono.wav', RATE).shape == (RATE,)
    stereo = read_audio(audio_folder / 'stereo.flac', RATE)
    assert stereo.dtype == np.float32 and abs(len(stereo) - 0.7 * RATE) <= 1
    part = read_audio(audio_folder / 'mono.wav', RATE, offset=0.5, duration=0.25)
    np.testing.assert_array_equal(part, read_audio(audio_folder / 'mono.wav', RATE)[8000:12000])


@pytest.mark.parametrize(
    'name, reason',
    [
        ('missing.wav', 'there is no such file'),
        ('empty.wav', 'the file is empty'),
        ('silent.wav', 'there are no samples in it'),
        ('text.wav', 'cannot be read as audio'),
        ('cut.wav', 'truncated'),
        ('cut.flac', ''),  # the decoder's own words
        ('broken.wav', 'samples that are not finite'),
        ('', 'there is no such file'),  # a folder
    ],
)
def test_bad_files_are_named(audio_folder, name, reason):
    with pytest.raises(ValueError, match=f'{audio_folder / name}.*{reason}'):
        read_audio(audio_folder / name, RATE)


def test_entries_are_those_of_audio_files_or_of_a_manifest(audio_folder, tmp_path):
    assert audio_entries([Path('a.wav'), Path('-')], None) == [{'audio_filepath': name} for name in ('a.wav', '-')]
    manifest = audio_folder / 'entries.json'
    manifest.write_text(json.dumps({'audio_filepath': 'mono.wav', 'duration': 0.5, 'text': 'a'}) + '\n')
    (entry,) = audio_entries([], manifest)
    assert entry == {'audio_filepath': str(audio_folder / 'mono.wav'), 'duration': 0.5, 'text': 'a'}
    assert read_entry(entry, RATE).shape == (RATE // 2,)
    manifest.write_text('{"text": "a"}')
    with pytest.raises(ValueError, match='entries.json, line 1 has no audio_filepath'):
        audio_entries([], manifest)
