# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import soundfile

SPOKEN = {'train': {'000010011': '0001', '000010035': '0001'}, 'test': {'000030012': '0003', '000490001': '0049'}}
WORDS = [{'text': 'WE', 'phones': ['W', 'IY0']}, {'text': 'CALL', 'phones': 'K AO1 L'}]


@pytest.fixture
def corpus(tmp_path):
    """A tree like the public corpus', of two utterances in each part."""
    root, scores = tmp_path / 'speechocean762', {}
    for part, spoken in SPOKEN.items():
        paths = {name: f'WAVE/SPEAKER{speaker}/{name}.WAV' for name, speaker in spoken.items()}
        tables = {'wav.scp': paths, 'utt2spk': spoken, 'text': dict.fromkeys(spoken, 'WE CALL')}
        for folder in [root / part, root / 'resource', *((root / path).parent for path in paths.values())]:
            folder.mkdir(parents=True, exist_ok=True)
        for path in paths.values():
            soundfile.write(root / path, np.zeros(8000), 16000, format='WAV')
        for name, table in tables.items():
            (root / part / name).write_text(''.join(f'{key}\t{value}\n' for key, value in table.items()))
        scores.update({name: {'text': 'WE CALL', 'words': WORDS} for name in spoken})
    (root / 'resource/scores.json').write_text(json.dumps(scores))
    return root


@pytest.fixture
def prepare(load, corpus, tmp_path):
    """Return a function that runs the script; it gives the status and the entries of train and of test."""

    def run(*words):
        status = load('prepare_speechocean762').main(
            ['--corpus', str(corpus), '--output', str(tmp_path / 'out'), *words]
        )
        files = sorted((tmp_path / 'out').glob('*_manifest.json'), reverse=True)
        return status, [[json.loads(line) for line in path.read_text().splitlines()] for path in files]

    return run


def test_the_manifests_have_audio_text_phones_and_speakers(prepare, corpus):
    status, (train, test) = prepare()
    assert status == 0 and len(train) == 2 and [entry['speaker'] for entry in test] == ['so-0003', 'so-0049']
    file = str(corpus / 'WAVE/SPEAKER0001/000010011.WAV')
    expected = {'duration': 0.5, 'text': 'we call', 'phones': 'W IY K AO L', 'speaker': 'so-0001'}
    assert train[0] == {'audio_filepath': file, **expected}


def test_the_test_can_be_that_of_a_result(prepare, tmp_path):
    (tmp_path / 'probe.csv').write_text('arm,errors\n(phones),3 4\n(speakers),so-0049 so-0049\n')
    status, (train, test) = prepare('--test-speakers-of', str(tmp_path / 'probe.csv'))
    assert status == 0 and len(train) == 2 and [entry['speaker'] for entry in test] == ['so-0049']
