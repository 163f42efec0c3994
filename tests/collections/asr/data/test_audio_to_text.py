# SPDX-License-Identifier: Apache-2.0
import io
import json
import tarfile

import pytest

from nemo.collections.asr.data.audio_to_text import TarredAudioToCharDataset


def test_an_error_names_the_member_of_the_tar_file(tmp_path):
    with tarfile.open(tmp_path / 'audio_0.tar', 'w') as tar:
        member = tarfile.TarInfo('broken.wav')
        member.size = 20
        tar.addfile(member, io.BytesIO(b'RIFF, and no more...'))
    entry = {'audio_filepath': 'broken.wav', 'duration': 1.0, 'text': 'a', 'shard_id': 0}
    (tmp_path / 'manifest.json').write_text(json.dumps(entry) + '\n')
    dataset = TarredAudioToCharDataset(
        audio_tar_filepaths=str(tmp_path / 'audio_0.tar'),
        manifest_filepath=str(tmp_path / 'manifest.json'),
        labels=['a'],
        sample_rate=16000,
    )
    with pytest.raises(ValueError, match='the member broken of a tar file'):
        next(iter(dataset))
