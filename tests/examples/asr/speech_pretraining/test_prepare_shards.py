# SPDX-License-Identifier: Apache-2.0
"""Shards have what the manifests had, whole or not at all; trained on they are in ``tests/faults``."""

import json
import subprocess

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from nemo.collections.asr.data import shard_writer

RATE = 16000


@pytest.fixture
def shards(load_example):
    return load_example('prepare_shards')


@pytest.fixture
def manifest(tmp_path):
    """Seven utterances, one of them a part of a file, and four bad ones between them."""
    rows = []
    for number in range(7):
        samples = np.random.default_rng(number).normal(0, 0.1, RATE + 1600 * number)
        soundfile.write(tmp_path / f'{number}.wav', samples, RATE, subtype='PCM_16')
        rows.append({'audio_filepath': f'{number}.wav', 'duration': len(samples) / RATE, 'text': f'word {number}'})
    rows[6] |= {'offset': 0.5, 'duration': 0.7, 'speaker': 'x', 'source': 'here'}
    soundfile.write(tmp_path / 'nan.wav', np.full(RATE, np.nan), RATE, subtype='FLOAT')
    (tmp_path / 'junk.wav').write_bytes(b'RIFFjunk')
    soundfile.write(tmp_path / 'short.wav', np.zeros(RATE // 4), RATE)
    for place, name in enumerate(('nan.wav', 'junk.wav', 'short.wav', 'none.wav')):
        rows.insert(2 * place + 1, {'audio_filepath': name, 'duration': 1.0, 'text': ''})
    path = tmp_path / 'manifest.json'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def pack(shards, manifest, *more):
    return shards.main(
        ['--manifest', str(manifest), '--output', str(manifest.parent / 'out'), '--shard_size=4', *more]
    )


def contents(folder):
    """Every file by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_a_pattern_names_several_manifests(shards, manifest, monkeypatch, capsys):
    entry = manifest.read_text().splitlines()[0]
    for number in range(2):
        (manifest.parent / f'm_{number}.json').write_text(f'{entry}\n')
    monkeypatch.setenv('HOME', str(manifest.parent))
    assert shards.main(['--manifest', '~/m_{0..1}.json', '--output', str(manifest.parent / 'out')]) == 0
    assert capsys.readouterr().out.startswith('2 utterances')


@pytest.mark.parametrize('workers', [1, 2])
def test_shards_have_all_that_is_sound_and_the_report_names_the_rest(shards, manifest, workers, capsys):
    assert pack(shards, manifest, f'--workers={workers}') == 0
    out = manifest.parent / 'out'
    cuts = {cut.supervisions[0].text: cut for cut in CutSet.from_shar(in_dir=out / 'shar')}
    assert sorted(cuts) == [f'word {number}' for number in range(7)]
    for number in range(6):
        found, there = cuts[f'word {number}'].load_audio()[0], soundfile.read(manifest.parent / f'{number}.wav')[0]
        assert np.abs(found - there).max() < 1e-4
    part, whole = cuts['word 6'].load_audio()[0], soundfile.read(manifest.parent / '6.wav')[0]
    assert len(part) == 0.7 * RATE and np.abs(part - whole[8000:][: len(part)]).max() < 1e-4
    assert cuts['word 6'].supervisions[0].speaker == 'x' and cuts['word 6'].custom['source'] == 'here'
    report, printed = json.loads((out / 'report.json').read_text()), capsys.readouterr().out
    assert (report['shards'], report['utterances']) == (3, 7)
    bad = {entry['file']: entry['reason'] for entry in report['bad']}
    assert sorted(bad) == ['junk.wav', 'nan.wav', 'none.wav', 'short.wav']
    assert 'NaN or infinite' in bad['nan.wav'] and '1.00' in bad['short.wav']
    assert '7 utterances' in printed and all(name in printed for name in bad)
    assert sorted(path.name for path in out.iterdir()) == ['SHA256SUMS', 'plan.json', 'report.json', 'shar']
    assert not subprocess.run(['sha256sum', '-c', '--quiet', 'SHA256SUMS'], cwd=out, check=False).returncode


def test_after_a_kill_whole_shards_stay_and_the_result_is_the_same(shards, manifest, monkeypatch):
    assert pack(shards, manifest) == 0
    out = manifest.parent / 'out'
    whole = contents(out)
    out.rename(manifest.parent / 'first')
    check, written = shard_writer.check_written, []

    def killed_in_the_second(folder, number, durations):
        written.append(number)
        if written == [0, 1]:
            raise KeyboardInterrupt
        check(folder, number, durations)

    monkeypatch.setattr(shard_writer, 'check_written', killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        pack(shards, manifest)
    assert not (out / 'shar').exists()
    assert pack(shards, manifest) == 0 and written == [0, 1, 1, 2]
    again = contents(out)
    # tar files hold times of writing; the plan holds the folder
    assert set(again) == set(whole) and again['report.json'] == whole['report.json']
    assert pack(shards, manifest) == 0 and written == [0, 1, 1, 2]  # done


def test_a_kill_while_the_shards_are_put_together_loses_none(shards, manifest, monkeypatch):
    replace, moved = shard_writer.os.replace, []

    def killed(source, target):
        if '.parts' in str(source) and len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(shard_writer.os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        pack(shards, manifest)
    monkeypatch.setattr(shard_writer.os, 'replace', replace)
    assert pack(shards, manifest) == 0
    assert len(list(CutSet.from_shar(in_dir=manifest.parent / 'out/shar'))) == 7


def test_what_is_read_back_must_be_what_went_in(shards, manifest, monkeypatch, capsys):
    monkeypatch.setattr(shard_writer.CutSet, 'from_shar', staticmethod(lambda fields: []))
    assert pack(shards, manifest) == 2
    assert 'shard 0: 0-0 has 1.0 s, and None when it is read back' in capsys.readouterr().err
    assert not (manifest.parent / 'out/shar').exists()


@pytest.mark.parametrize(
    'more, message',
    [
        (['--bad_audio=stop'], 'line 2: nan.wav: BadAudioError: it has samples'),
        (['--shard_size=0'], '--shard_size is 0; it must be 1 or more'),
        (['--min_duration=9'], 'nothing is left of'),
        (['--manifest', 'none.json'], '--manifest: no file'),
    ],
)
def test_a_mistake_ends_in_one_message(shards, manifest, more, message, capsys):
    assert pack(shards, manifest, *more) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_other_shards_is_refused(shards, manifest, capsys):
    assert pack(shards, manifest) == 0
    assert pack(shards, manifest, '--shuffle=1') == 2
    assert 'has shards with shuffle None, not 1; take another folder' in capsys.readouterr().err


def test_shuffled_shards_have_the_same_utterances_in_another_order(shards, manifest):
    assert pack(shards, manifest, '--shuffle=1') == 0
    texts = [cut.supervisions[0].text for cut in CutSet.from_shar(in_dir=manifest.parent / 'out/shar')]
    assert sorted(texts) == [f'word {number}' for number in range(7)] and texts != sorted(texts)
