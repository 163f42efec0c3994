# SPDX-License-Identifier: Apache-2.0
"""Recognisers that read through lhotse mix channels down, count what cannot be read, and refuse NaN."""

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment

from nemo.collections.asr.data.audio_to_text_lhotse import LhotseSpeechToTextBpeDataset
from nemo.collections.common.parts.preprocessing.parsers import make_parser
from nemo.utils.left_out import LEFT_OUT


def test_bad_audio_and_channels(tmp_path, monkeypatch):
    monkeypatch.setattr(LEFT_OUT, 'path', str(tmp_path / 'left_out'))
    samples = np.full((16000, 2), 0.25, dtype=np.float32)
    samples[:, 1] = -0.75
    broken = np.where(np.arange(16000) == 5, np.nan, 0.1)
    for name, content in (('two', samples), ('gone', samples), ('broken', broken)):
        soundfile.write(tmp_path / f'{name}.wav', content, 16000, subtype='FLOAT')
    cuts = {name: Recording.from_file(tmp_path / f'{name}.wav').to_cut() for name in ('two', 'gone', 'broken')}
    for name, cut in cuts.items():
        cut.supervisions.append(SupervisionSegment(name, name, 0, 1.0, text='ab'))
    (tmp_path / 'gone.wav').unlink()
    dataset = LhotseSpeechToTextBpeDataset(make_parser(labels=['a', 'b'], name='en'))
    audio = dataset[CutSet.from_cuts([cuts['two'], cuts['gone']])][0]
    assert audio.shape == (1, 16000) and audio.mean().item() == pytest.approx(-0.25)
    assert LEFT_OUT.total() == 1 and 'gone.wav' in LEFT_OUT.summary()
    with pytest.raises(ValueError, match='broken.wav.*NaN'):
        dataset[CutSet.from_cuts([cuts['broken']])]
