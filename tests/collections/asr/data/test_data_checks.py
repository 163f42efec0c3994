# SPDX-License-Identifier: Apache-2.0
"""What the loaders read passes; what they cannot read is an error before training that names it."""

import gzip
import json
import tarfile

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording
from omegaconf import OmegaConf
from tiny_recogniser import tiny_recogniser
from word_pieces import make_tokenizer

from nemo.collections.asr.data.data_checks import characters_of, check_data, report_unknown_characters

LIMITS = {'min_duration': 1.0, 'max_duration': 16.0}


def write(path, entries):
    path.write_text(''.join(json.dumps(each) + '\n' for each in entries), encoding='utf-8')
    return str(path)


@pytest.fixture(scope='module')
def speech(tmp_path_factory):
    """Six utterances of two seconds: in two manifests, in two tar files with manifests, in a folder of shards."""
    folder = tmp_path_factory.mktemp('speech')
    rows = [[], []]
    for number in range(6):
        name = f'{number}.wav'
        soundfile.write(folder / name, np.random.default_rng(number).normal(0, 0.1, 32000), 16000)
        rows[number % 2].append({'audio_filepath': name, 'duration': 2.0, 'shard_id': number % 2})
    for shard, entries in enumerate(rows):
        write(folder / f'manifest_{shard}.json', entries)
        write(folder / f'tarred_manifest_{shard}.json', entries)
        with tarfile.open(folder / f'audio_{shard}.tar', 'w') as archive:
            for entry in entries:
                archive.add(folder / entry['audio_filepath'], entry['audio_filepath'])
    (folder / 'all.jsonl.gz').write_bytes(gzip.compress((folder / 'manifest_0.json').read_bytes()))
    (folder / 'shar').mkdir()
    CutSet.from_cuts(Recording.from_file(path).to_cut() for path in sorted(folder.glob('*.wav'))).to_shar(
        folder / 'shar', fields={'recording': 'wav'}
    )
    return folder


def check(speech, **section):
    text = json.dumps(section).replace('SPEECH', str(speech))
    check_data('model.train_ds', OmegaConf.create(json.loads(text)))


TARRED = {
    'manifest_filepath': 'SPEECH/tarred_manifest__OP_0..1_CL_.json',
    'tarred_audio_filepaths': 'SPEECH/audio__OP_0..1_CL_.tar',
}
GROUP = {'type': 'nemo', 'manifest_filepath': 'SPEECH/manifest_0.json', 'weight': 0.5}
READ = {
    'braces': {'manifest_filepath': 'SPEECH/manifest_{0..1}.json'},
    '_OP_': {'manifest_filepath': 'SPEECH/manifest__OP_0..1_CL_.json'},
    'gz': {'manifest_filepath': 'SPEECH/all.jsonl.gz'},
    'list': {'manifest_filepath': [['SPEECH/manifest_0.json'], ['SPEECH/manifest_1.json']]},
    'weights': {'manifest_filepath': [['SPEECH/manifest_0.json', 0.7], ['SPEECH/manifest_1.json', 0.3]]},
    'tarred': TARRED,
    'shar': {'shar_path': 'SPEECH/shar'},
    'shar with weights': {'shar_path': [['SPEECH/shar', 0.2], ['SPEECH/shar', 0.8]]},
    'groups': {'input_cfg': [GROUP, {'type': 'group', 'weight': 0.5, 'input_cfg': [GROUP]}]},
    'elsewhere': {'manifest_filepath': 's3://bucket/manifest_{0..9}.json'},
}


@pytest.mark.parametrize('name', READ)
def test_what_lhotse_reads_passes(speech, name):
    check(speech, use_lhotse=True, **READ[name])


def test_what_is_read_only_if_it_is_resumable(speech):
    """Where NeMo mixes a manifest and shards if told how, and wants tar files to have numbers in their names."""
    mixture = {
        'use_lhotse': True,
        'input_cfg': [GROUP, {'type': 'lhotse_shar', 'shar_path': 'SPEECH/shar', 'weight': 1.0}],
    }
    check(speech, resumable={'seed': 0}, **mixture)
    with pytest.raises(ValueError, match='model.train_ds: .*force_iterable_dataset'):
        check(speech, **mixture)
    (speech / 'other.tar').write_bytes((speech / 'audio_0.tar').read_bytes())
    tarred = {'manifest_filepath': 'SPEECH/tarred_manifest_0.json', 'tarred_audio_filepaths': 'SPEECH/other.tar'}
    check(speech, is_tarred=True, **tarred)
    with pytest.raises(ValueError, match='model.train_ds: .*other.tar'):
        check(speech, is_tarred=True, resumable={'seed': 0}, **tarred)


def test_a_path_may_begin_with_a_tilde(speech, monkeypatch):
    monkeypatch.setenv('HOME', str(speech))
    for use_lhotse in (True, False):
        check(speech, use_lhotse=use_lhotse, manifest_filepath='~/manifest_0.json', noise_manifest='~/all.jsonl.gz')
    check(speech, use_lhotse=True, shar_path='~/shar', noise_manifest='~/manifest_{0..1}.json')


@pytest.mark.parametrize(
    'section, message',
    [
        (
            {'manifest_filepath': 'SPEECH/manifest_{0..2}.json'},
            'train_ds.manifest_filepath: no file .*manifest_2.json',
        ),
        ({'input_cfg': [GROUP, {**GROUP, 'manifest_filepath': 'gone.json'}]}, r'input_cfg\[1\].*no file gone.json'),
        ({**TARRED, 'tarred_audio_filepaths': 'gone_0.tar'}, 'no file gone'),
        (
            {**TARRED, 'tarred_audio_filepaths': 'SPEECH/audio_0.tar'},
            'lhotse cannot read the data: .*Mismatch between',
        ),
        ({'manifest_filepath': [['SPEECH/manifest_0.json', 'often']]}, 'no file often'),
        ({'shar_path': 'SPEECH'}, 'has no shards'),
    ],
)
def test_what_lhotse_cannot_read_is_named(speech, section, message):
    with pytest.raises(ValueError, match=message):
        check(speech, use_lhotse=True, **section)


def test_plain_and_tarred_manifests_of_nemos_own_readers(speech):
    check(speech, manifest_filepath='SPEECH/manifest_0.json,SPEECH/manifest_1.json', noise_manifest='SPEECH/shar')
    check(speech, is_tarred=True, **TARRED)
    for name in ('manifest_{0..1}.json', 'all.jsonl.gz'):
        with pytest.raises(ValueError, match='use_lhotse: true'):
            check(speech, manifest_filepath=f'SPEECH/{name}')


GOOD = b'{"audio_filepath": "0.wav", "duration": 2}\n'


@pytest.mark.parametrize(
    'content, words',
    [
        (b'\n  \n', 'has no entries'),
        (b'{"audio_filepath": "0.wav", "duration": 2}\n{"audio_filepath": \n', 'line 2 is no JSON'),
        (b'["0.wav", 2]\n', 'line 1 is no JSON object'),
        (b'{"duration": 2}\n', 'line 1 has no audio_filepath'),
        (b'{"audio_filepath": 7, "duration": 2}\n', 'line 1 has no audio_filepath'),
        (b'{"audio_filepath": "gone.wav", "duration": 2}\n', 'line 1: no audio file gone.wav'),
        (b'RIFF\x24\x80\x00\x00WAVE', ''),
        (GOOD + b'{"duration": 2}\n' + GOOD, 'line 2 has no audio_filepath'),
        (
            GOOD + b'{"audio_filepath": "0.wav", "duration": "2"}\n' + GOOD,
            "line 2: duration is '2'; it must be a number",
        ),
        (
            GOOD + b'{"audio_filepath": "0.wav", "duration": NaN}\n' + GOOD,
            'line 2: duration is nan; it must be a number',
        ),
        (
            GOOD + b'{"audio_filepath": "0.wav", "duration": 2, "offset": -1}\n' + GOOD,
            'line 2: offset is -1;.*0 or more',
        ),
    ],
)
@pytest.mark.parametrize('reader', [{}, {'use_lhotse': True}, {**TARRED, 'is_tarred': True}])
def test_a_bad_manifest_is_named(speech, content, words, reader):
    if reader.get('is_tarred') and 'no audio file' in words:
        return  # it is in the tar file
    (speech / 'bad.json').write_bytes(content)
    with pytest.raises(ValueError, match=f'model.train_ds.manifest_filepath: .*bad.json.*{words}'):
        check(speech, **{**reader, 'manifest_filepath': 'SPEECH/bad.json'})


def test_lhotse_needs_a_duration_in_each_entry(speech):
    (speech / 'bad.json').write_bytes(GOOD + b'{"audio_filepath": "0.wav"}\n' + GOOD)
    check(speech, manifest_filepath='SPEECH/bad.json')
    with pytest.raises(ValueError, match='bad.json, line 2 has no duration'):
        check(speech, manifest_filepath='SPEECH/bad.json', use_lhotse=True)


@pytest.mark.parametrize('duration', [0.5, 16.5])
def test_a_manifest_must_have_something_between_the_limits(speech, duration):
    path = write(speech / 'limits.json', [{'audio_filepath': '0.wav', 'duration': duration}] * 3)
    with pytest.raises(ValueError, match='none of the 3 entries .*1.0.*16.0'):
        check(speech, manifest_filepath=path, **LIMITS)
    check(speech, manifest_filepath=str(speech / 'manifest_0.json'), noise_manifest=path, **LIMITS)
    for source in ({'manifest_filepath': 'SPEECH/manifest_0.json'}, {'shar_path': 'SPEECH/shar'}):
        with pytest.raises(ValueError, match='min_duration = 3.0 to max_duration = .* has no entries'):
            check(speech, use_lhotse=True, min_duration=3.0, **source)


@pytest.mark.parametrize('key', ['shar_path', 'noise_manifest'])
def test_folders_without_shards_or_cuts(speech, tmp_path, key):
    data = {'use_lhotse': True, 'manifest_filepath': 'SPEECH/manifest_0.json', key: str(tmp_path)}
    cuts, recording = 'cuts.000000.jsonl.gz', 'recording.000000.tar'
    for name, message in ((None, cuts), (cuts, recording), (recording, 'has no entries|lhotse cannot read')):
        if name is not None:
            (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f'model.train_ds.{key}: .*({message})'):
            check(speech, **data)


@pytest.fixture
def transcripts(tmp_path):
    """Two manifests, the second compressed."""
    rows = [[{'text': 'ban'}, {'text': 'bean eb'}], [{'text': "nabe's"}, {'text': 'Bébé'}]]
    texts = [
        ''.join(json.dumps({'audio_filepath': 'a.wav', 'duration': 1.0, **row}) + '\n' for row in each)
        for each in rows
    ]
    (tmp_path / 'first.json').write_text(texts[0])
    (tmp_path / 'second.json.gz').write_bytes(gzip.compress(texts[1].encode()))
    return tmp_path


def test_the_characters_of_every_manifest_are_found(transcripts):
    section = {'manifest_filepath': f'{transcripts}/first.json,{transcripts}/second.json.gz'}
    assert ''.join(characters_of(section)) == " 'Babensé"
    group = {'input_cfg': [{'type': 'nemo', 'manifest_filepath': f'{transcripts}/first.json'}]}
    assert ''.join(characters_of(group)) == ' aben'


def test_unknown_characters_are_counted_and_named(transcripts, warnings):
    section = {'manifest_filepath': [f'{transcripts}/second.json.gz']}
    unknown = report_unknown_characters('model.validation_ds', section, tiny_recogniser('ctc'))
    assert unknown == {"'": 1, 's': 1, 'B': 1, 'é': 2}
    assert len(warnings) == 1 and warnings[0].startswith('model.validation_ds: ') and "'é' 2" in warnings[0]
    assert not report_unknown_characters(
        'x', {'manifest_filepath': f'{transcripts}/first.json'}, tiny_recogniser('ctc')
    )
    assert len(warnings) == 1


def test_a_tokenizer_is_asked_for_its_pieces(transcripts, tmp_path, warnings):
    model = tiny_recogniser('ctc', tokenizer=make_tokenizer(tmp_path))
    section = {'manifest_filepath': f'{transcripts}/second.json.gz'}
    assert report_unknown_characters('model.test_ds', section, model)['é'] == 2


def test_a_missing_text_is_named(tmp_path):
    (tmp_path / 'm.json').write_text('{"audio_filepath": "a.wav", "duration": 1}\n')
    with pytest.raises(ValueError, match='m.json, line 1 has no text'):
        characters_of({'manifest_filepath': str(tmp_path / 'm.json')})
