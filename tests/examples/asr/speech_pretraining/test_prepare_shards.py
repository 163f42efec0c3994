# SPDX-License-Identifier: Apache-2.0
"""Shards have what the manifests had, whole or not at all; ``tests/faults`` trains on them."""

import json
import subprocess

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from nemo.collections.asr.data import shard_writer

RATE = 16000
BAD = ('nan.wav', 'junk.wav', 'short.wav', 'none.wav')


@pytest.fixture
def shards(load_example):
    return load_example('prepare_shards')


@pytest.fixture
def manifest(tmp_path, left_out):
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
    for place, name in enumerate(BAD):
        rows.insert(2 * place + 1, {'audio_filepath': name, 'duration': 1.0, 'text': ''})
    path = tmp_path / 'manifest.json'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


@pytest.fixture
def out(manifest):
    return manifest.parent / 'out'


def pack(shards, manifest, *more):
    words = ['--manifest', str(manifest), '--output', str(manifest.parent / 'out'), '--shard_size=4']
    return shards.main([*words, *more])


def cuts_of(out):
    return list(CutSet.from_shar(in_dir=out / 'shar'))


def test_a_pattern_names_several_manifests(shards, manifest, out, monkeypatch, capsys):
    entry = manifest.read_text().splitlines()[0]
    for number in range(2):
        (manifest.parent / f'm,{number}.json').write_text(f'{entry}\n')
    monkeypatch.setenv('HOME', str(manifest.parent))
    assert shards.main(['--manifest', '~/m,{0..1}.json', '--output', str(out)]) == 0
    assert capsys.readouterr().out.startswith('2 utterances')


@pytest.mark.parametrize('workers', [1, 2])
def test_shards_have_all_valid_audio_and_the_report_names_the_rest(shards, manifest, out, workers, capsys):
    assert pack(shards, manifest, f'--workers={workers}') == 0
    cuts = {cut.supervisions[0].text: cut for cut in cuts_of(out)}
    assert sorted(cuts) == [f'word {number}' for number in range(7)]
    for number in range(7):
        found, wanted = cuts[f'word {number}'].load_audio()[0], soundfile.read(manifest.parent / f'{number}.wav')[0]
        wanted = wanted if number < 6 else wanted[8000 : 8000 + int(0.7 * RATE)]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert cuts['word 6'].supervisions[0].speaker == 'x' and cuts['word 6'].custom['source'] == 'here'
    report, printed = json.loads((out / 'report.json').read_text()), capsys.readouterr().out
    assert (report['shards'], report['utterances']) == (3, 7)
    bad = {entry['file']: entry['reason'] for entry in report['bad']}
    assert set(bad) == set(BAD) and 'NaN or infinite' in bad['nan.wav'] and '1.0 s' in bad['short.wav']
    assert '7 utterances' in printed and all(name in printed for name in bad)
    assert sorted(path.name for path in out.iterdir()) == ['SHA256SUMS', 'plan.json', 'report.json', 'shar']
    assert not subprocess.run(['sha256sum', '-c', '--quiet', 'SHA256SUMS'], cwd=out, check=False).returncode


def test_after_a_kill_whole_shards_stay_and_the_result_is_the_same(shards, manifest, out, monkeypatch):
    assert pack(shards, manifest) == 0
    report, files = (out / 'report.json').read_bytes(), {path.relative_to(out) for path in out.rglob('*')}
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
    assert (out / 'report.json').read_bytes() == report
    assert {path.relative_to(out) for path in out.rglob('*')} == files
    assert pack(shards, manifest) == 0 and written == [0, 1, 1, 2]  # done


def test_audio_that_reads_back_otherwise_is_an_error(shards, manifest, out, monkeypatch, capsys):
    monkeypatch.setattr(shard_writer.CutSet, 'from_shar', staticmethod(lambda fields: []))
    assert pack(shards, manifest) == 2
    assert 'shard 0: 0-0' in capsys.readouterr().err and not (out / 'shar').exists()


@pytest.mark.parametrize(
    'more, message',
    [
        (['--bad_audio=stop'], 'line 2: nan.wav'),
        (['--shard_size=0'], '--shard_size is 0'),
        (['--min_duration=9'], 'nothing is left of'),
        (['--manifest', 'none.json'], 'none.json'),
    ],
)
def test_a_mistake_ends_in_one_message(shards, manifest, more, message, capsys):
    assert pack(shards, manifest, *more) == 2
    assert message in capsys.readouterr().err


def test_shuffled_shards_have_another_order_and_a_folder_of_their_own(shards, manifest, out, capsys):
    assert pack(shards, manifest, '--shuffle=1') == 0
    texts = [cut.supervisions[0].text for cut in cuts_of(out)]
    assert sorted(texts) == [f'word {number}' for number in range(7)] and texts != sorted(texts)
    assert pack(shards, manifest) == 2
    assert 'shuffle 1, not None' in capsys.readouterr().err


def test_what_the_limits_leave_out_is_counted(shards, manifest, capsys):
    entry = {'audio_filepath': 'long.wav', 'duration': 99.0}
    manifest.write_text(manifest.read_text().rstrip() + '\n' + json.dumps(entry) + '\n')
    assert pack(shards, manifest, '--max_duration=9') == 0
    assert '1 utterances were left out: 1 outside of min_duration and max_duration' in capsys.readouterr().out
