# SPDX-License-Identifier: Apache-2.0
import json
import re

import numpy as np
import pytest
import soundfile

SPOKEN = {'train': {'000010011': '0001', '000010035': '0001'}, 'test': {'000030012': '0003', '000490001': '0049'}}
WORDS = [
    {'text': 'WE', 'phones': ['W', 'IY0'], 'phones-accuracy': [2.0, 2.0]},
    {'text': 'CALL', 'phones': 'K AO1 L', 'phones-accuracy': [2.0, 2.0, 1.8]},
]


@pytest.fixture(scope='module')
def script(load):
    return load('prepare_speechocean762')


@pytest.fixture
def corpus(tmp_path):
    """A tree like the public corpus', of two utterances in each part."""
    root, scores = tmp_path / 'speechocean762', {}
    for part, spoken in SPOKEN.items():
        (root / part).mkdir(parents=True)
        paths = {name: f'WAVE/SPEAKER{speaker}/{name}.WAV' for name, speaker in spoken.items()}
        for path in paths.values():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(root / path, np.zeros(8000), 16000, format='WAV')
        tables = {'wav.scp': paths, 'utt2spk': spoken, 'text': {name: 'WE CALL' for name in spoken}}
        for name, table in tables.items():
            (root / part / name).write_text(''.join(f'{key}\t{value}\n' for key, value in table.items()))
        scores.update({name: {'text': 'WE CALL', 'words': WORDS} for name in spoken})
    (root / 'resource').mkdir()
    (root / 'resource/scores.json').write_text(json.dumps(scores))
    return root


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_manifests_have_audio_text_phones_and_speakers(script, corpus, tmp_path, capsys):
    output = tmp_path / 'manifests'
    assert script.main(['--corpus', str(corpus), '--output', str(output)]) == 0
    assert 'train_manifest.json: 2 utterances' in capsys.readouterr().out
    assert read(output / 'speechocean762_train_manifest.json')[0] == {
        'audio_filepath': str(corpus / 'WAVE/SPEAKER0001/000010011.WAV'),
        'duration': 0.5,
        'text': 'we call',
        'phones': 'W IY K AO L',
        'speaker': 'so-0001',
    }
    assert [entry['speaker'] for entry in read(output / 'speechocean762_test_manifest.json')] == ['so-0003', 'so-0049']


def test_the_test_can_be_that_of_a_result(script, corpus, tmp_path):
    result = tmp_path / 'probe.csv'
    result.write_text('arm,errors\n(phones),3 4\n(speakers),so-0049 so-0049\n')
    words = ['--corpus', str(corpus), '--output', str(tmp_path / 'out'), '--test-speakers-of', str(result)]
    assert script.main(words) == 0
    assert [entry['speaker'] for entry in read(tmp_path / 'out/speechocean762_test_manifest.json')] == ['so-0049']
    assert len(read(tmp_path / 'out/speechocean762_train_manifest.json')) == 2


@pytest.mark.parametrize(
    'break_it, message',
    [
        (lambda root: (root / 'resource/scores.json').unlink(), 'no file .*scores.json'),
        (lambda root: (root / 'test/utt2spk').unlink(), 'no file .*test/utt2spk'),
        (lambda root: (root / 'test/utt2spk').write_text('000030012 0003\n'), 'utt2spk has no utterance 000490001'),
        (lambda root: (root / 'train/text').write_text('000010011\n'), 'text, line 1 says nothing of 000010011'),
        (lambda root: (root / 'WAVE/SPEAKER0001/000010011.WAV').unlink(), 'no audio file .*000010011.WAV'),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(script, corpus, tmp_path, capsys, break_it, message):
    break_it(corpus)
    output = tmp_path / 'manifests'
    assert script.main(['--corpus', str(corpus), '--output', str(output)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not output.exists()


def test_an_utterance_without_phones_or_with_others_is_refused(script):
    with pytest.raises(ValueError, match='here: there are no phones'):
        script.phone_string({'words': []}, 'here')
    with pytest.raises(ValueError, match="here: 'XX' is no phone"):
        script.phone_string({'words': [{'phones': ['XX']}]}, 'here')
