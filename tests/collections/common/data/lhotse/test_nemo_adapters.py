# SPDX-License-Identifier: Apache-2.0
"""Damaged, missing and cut-off audio reaches the dataset, in every reader of lhotse; segments and channels are right."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import lhotse
import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.lazy import LazyManifestIterator
from omegaconf import open_dict
from tiny_recogniser import tiny_recogniser
from word_pieces import make_tokenizer

from nemo.collections.asr.data.ssl_dataset import BadAudioError, LhotseAudioNoiseDataset
from nemo.collections.common.data.lhotse.nemo_adapters import NO_MEMBER, LazyNeMoIterator, LazyNeMoTarredIterator
from nemo.collections.common.data.lhotse.sampling import DurationFilter
from nemo.utils.left_out import OUTSIDE_LIMITS

pytestmark = pytest.mark.usefixtures('left_out')
RATE = 16000


def ramp(seconds, channels=1):
    samples = np.linspace(0, 0.5, int(seconds * RATE), dtype=np.float32)
    return samples if channels == 1 else np.stack([samples, -samples / 2], axis=1)


def wav(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format='WAV', subtype='FLOAT')
    return file.getvalue()


def tarred(folder, contents, **more):
    """Write a tarred manifest of one entry for each content, and return NeMo's reader of it."""
    with tarfile.open(folder / 'audio_0.tar', 'w') as tar, open(folder / 'manifest_0.json', 'w') as lines:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f'u{number}.wav')
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            lines.write(json.dumps({'audio_filepath': member.name, 'duration': 1.0, 'shard_id': 0, **more}) + '\n')
    return LazyNeMoTarredIterator(str(folder / 'manifest_0.json'), str(folder / 'audio_0.tar'))


def batch(cuts, skip):
    dataset = LhotseAudioNoiseDataset()
    dataset.skip_bad_audio = skip
    return dataset[CutSet.from_cuts(cuts).to_eager()]


def test_nemos_transcribe_reads_files_whose_duration_it_does_not_know(tmp_path):
    paths, samples = [], [ramp(1.0), ramp(1.6)]
    for number, each in enumerate(samples):
        paths.append(str(tmp_path / f'{number}.wav'))
        soundfile.write(paths[-1], each, RATE, subtype='FLOAT')
    model = tiny_recogniser('ctc', tokenizer=make_tokenizer(tmp_path))
    with open_dict(model.cfg):
        model.cfg.validation_ds = {}  # NeMo asks it for settings
    of_files, of_samples = (model.transcribe(audio, batch_size=2, verbose=False) for audio in (paths, samples))
    assert [found.text for found in of_files] == [found.text for found in of_samples]
    assert all(found.text for found in of_files)


def test_a_line_that_is_no_json_is_named_and_a_blank_one_counts_as_nothing(tmp_path):
    path = tmp_path / 'm.json'
    soundfile.write(tmp_path / 'a.wav', ramp(1), RATE)
    entry = json.dumps({'audio_filepath': 'a.wav', 'duration': 1.0})
    path.write_text(f'{entry}\n\n{entry}\n\n')
    assert len(list(LazyNeMoIterator(str(path)))) == 2
    for line, why in (
        ('{bad', 'is no JSON'),
        ('[1]', 'is no JSON'),
        ('{"audio_filepath": "a.wav"}', 'has no duration'),
    ):
        path.write_text(f'{entry}\n{line}\n{entry}\n')
        with pytest.raises(ValueError, match=f'm.json, line 2 {why}'):
            list(LazyNeMoIterator(str(path)))


def test_what_nemo_reads_is_read(tmp_path):
    paths = [str(tmp_path / name) for name in ('a.json', 'b.json')]
    soundfile.write(tmp_path / 'a.wav', ramp(1.5), RATE)
    for path in paths:
        entries = [{'audio_filepath': str(tmp_path / 'a.wav'), 'duration': None}, {'_skipme': True}]
        Path(path).write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    assert [cut.duration for cut in LazyNeMoIterator(paths)] == [1.5, 1.5]
    assert [cut.duration for cut in LazyNeMoIterator([paths[0], 0.3])] == [1.5]
    Path(paths[0]).write_text('{"duration": "01:02"}\n\n[1, 2]\n')  # a user's own lines
    assert list(lhotse.lazy.LazyJsonlIterator(paths[0])) == [{'duration': '01:02'}, [1, 2]]


@pytest.mark.parametrize('more', [{}, {'offset': 0.5}])
def test_a_damaged_member_is_counted_or_named(tmp_path, left_out, more):
    contents = [wav(ramp(2)), b'\0' * 5000, wav(ramp(2))]
    found = batch(tarred(tmp_path, contents, **more), skip=True)
    assert len(found.audio) == 2 and found.skipped == 1 and left_out.total() == 1
    with pytest.raises(BadAudioError, match=r'u1.wav \(.*audio_0.tar\)'):
        batch(tarred(tmp_path, contents, **more), skip=False)


@pytest.mark.parametrize(
    'entry', [{'offset': 9.0}, {'offset': 1.5, 'duration': 2.0}, {'duration': 5.0}, {'duration': 0}]
)
def test_a_segment_that_a_member_lacks_is_counted_or_named(tmp_path, left_out, entry):
    """NeMo's reader takes the whole member for a segment that is not in it."""
    cuts = [*tarred(tmp_path, [wav(ramp(2))]), *tarred(tmp_path, [wav(ramp(2))], **entry)]
    found = batch(cuts, skip=True)
    assert len(found.audio) == 1 and found.skipped == left_out.total() == 1
    with pytest.raises(BadAudioError, match=r'u0.wav \(.*audio_0.tar\)'):
        batch(cuts, skip=False)


def test_segments_of_a_member_are_told_apart_though_nemo_gives_them_one_id(tmp_path, left_out):
    broken = ramp(3)
    broken[int(1.5 * RATE)] = np.nan
    cuts = list(tarred(tmp_path, [wav(broken)]))
    for entry in ({'offset': 1.0}, {'offset': 2.0, 'duration': 0.5}, {'offset': 9.0}):
        cuts += tarred(tmp_path, [wav(broken)], **entry)
    assert len({cut.id for cut in cuts}) == 1
    found = batch(cuts, skip=True)
    torch.testing.assert_close(
        found.audio[1][: RATE // 2], torch.from_numpy(ramp(3)[2 * RATE : -RATE // 2]), atol=1e-4, rtol=0
    )
    assert len(found.audio) == 2 and found.skipped == left_out.total() == 2
    shorter = DurationFilter(0.0, 0.3)
    assert not any(map(shorter, cuts)) and left_out.reasons()[OUTSIDE_LIMITS][0] == 4


@pytest.mark.parametrize('offset', [0.0, 0.25])
def test_samples_that_are_not_finite_stay_so_in_a_segment(tmp_path, left_out, offset):
    broken = ramp(2)
    broken[int(0.9 * RATE)] = np.nan
    found = batch(tarred(tmp_path, [wav(ramp(2)), wav(broken)], offset=offset), skip=True)
    assert len(found.audio) == 1 and left_out.total() == 1 and found.audio.abs().max() < 0.6
    with pytest.raises(BadAudioError, match=r'u1.wav \(.*audio_0.tar\): samples that are NaN'):
        batch(tarred(tmp_path, [wav(ramp(2)), wav(broken)], offset=offset), skip=False)


@pytest.mark.parametrize('share', [0.5, 0.0])
def test_what_follows_the_end_of_a_tar_file_is_counted_or_named(tmp_path, left_out, share):
    reader = tarred(tmp_path, [wav(ramp(1))] * 6)
    path = tmp_path / 'audio_0.tar'
    os.truncate(path, int(os.path.getsize(path) * share))
    cuts = list(reader)
    assert len(cuts) == (3 if share else 0) + 1  # the first that is missing stands for the others
    if share:
        assert batch(cuts, skip=True).skipped == left_out.total() == 3
    with pytest.raises(BadAudioError, match=rf'u{len(cuts) - 1}.wav \(.*audio_0.tar\): the file has no such member'):
        batch(cuts, skip=False)


def test_a_member_that_the_tar_file_lacks_is_counted(tmp_path, left_out):
    reader = tarred(tmp_path, [wav(ramp(1))] * 3)
    with open(tmp_path / 'manifest_0.json', 'a') as lines:
        lines.write(json.dumps({'audio_filepath': 'gone.wav', 'duration': 1.0, 'shard_id': 0}) + '\n')
    reader = LazyNeMoTarredIterator(str(tmp_path / 'manifest_0.json'), str(tmp_path / 'audio_0.tar'))
    assert batch(reader, skip=True).skipped == 1 and list(left_out.reasons()) == [NO_MEMBER]
    for number, skip in enumerate((None, True), 2):
        assert batch([*reader][-1:], skip).is_silence and left_out.total() == number  # NeMo has no such batch


def test_a_member_that_the_manifest_lacks_is_an_error_that_names_the_key(tmp_path):
    tarred(tmp_path, [wav(ramp(1))] * 3)
    first = (tmp_path / 'manifest_0.json').read_text().partition('\n')[0]
    (tmp_path / 'manifest_0.json').write_text(first)
    paths = str(tmp_path / 'manifest_0.json'), str(tmp_path / 'audio_0.tar')
    with pytest.raises(ValueError, match="'u1.wav'; skip_missing_manifest_entries: true"):
        list(LazyNeMoTarredIterator(*paths))
    assert len(list(LazyNeMoTarredIterator(*paths, skip_missing_manifest_entries=True))) == 1


@pytest.mark.parametrize('share', [0.7, 0.0])
def test_a_shard_that_is_cut_off_is_counted_or_named(tmp_path, left_out, share):
    for number in range(5):
        soundfile.write(tmp_path / f'{number}.wav', ramp(1), RATE)
    cuts = CutSet.from_cuts(Recording.from_file(tmp_path / f'{number}.wav').to_cut() for number in range(5))
    (tmp_path / 'shar').mkdir()
    cuts.to_shar(tmp_path / 'shar', fields={'recording': 'wav'})
    path = tmp_path / 'shar/recording.000000.tar'
    os.truncate(path, int(os.path.getsize(path) * share))
    read = list(CutSet.from_shar(in_dir=tmp_path / 'shar'))
    assert 1 <= len(read) < 5
    if share:
        batch(read, skip=True)
        assert left_out.total() == 5 - len(read) + 1
    with pytest.raises(BadAudioError, match='bad audio: '):
        batch(read, skip=False)


@pytest.mark.parametrize(
    'damage, message', [(lambda data: data[:-20], 'cannot be read'), (lambda data: gzip.compress(b'{"i'), 'line 1')]
)
def test_a_damaged_list_of_cuts_is_named(tmp_path, damage, message):
    soundfile.write(tmp_path / '0.wav', ramp(1), RATE)
    CutSet.from_cuts([Recording.from_file(tmp_path / '0.wav').to_cut()]).to_file(tmp_path / 'cuts.jsonl.gz')
    (tmp_path / 'cuts.jsonl.gz').write_bytes(damage((tmp_path / 'cuts.jsonl.gz').read_bytes()))
    with pytest.raises(ValueError, match=f'cuts.jsonl.gz.*{message}'):
        next(iter(LazyManifestIterator(tmp_path / 'cuts.jsonl.gz')))


def manifest(folder, *rows):
    (folder / 'm.json').write_text(''.join(json.dumps({'duration': 1.0, **row}) + '\n' for row in rows))


@pytest.mark.parametrize('more', [{}, {'sampling_rate': RATE}, {'sample_rate': RATE}])
def test_segments_of_a_file(tmp_path, more):
    soundfile.write(tmp_path / 'long.wav', ramp(4), RATE, subtype='FLOAT')
    manifest(tmp_path, *({'audio_filepath': 'long.wav', 'offset': float(start), **more} for start in range(4)))
    found = batch(LazyNeMoIterator(str(tmp_path / 'm.json')), skip=False)
    for start, samples in enumerate(found.audio):
        torch.testing.assert_close(samples, torch.from_numpy(ramp(4)[start * RATE : (start + 1) * RATE]))


@pytest.mark.parametrize(
    'row',
    [
        {'audio_filepath': 'junk.wav'},
        {'audio_filepath': 'ok.wav', 'offset': 9.0},
        {'audio_filepath': 'ok.wav', 'duration': 3.0},
    ],
)
def test_a_file_without_the_audio_is_counted_or_named(tmp_path, left_out, row):
    soundfile.write(tmp_path / 'ok.wav', ramp(1), RATE)
    (tmp_path / 'junk.wav').write_bytes(b'no audio')
    manifest(tmp_path, {'audio_filepath': 'ok.wav'}, row)
    assert batch(LazyNeMoIterator(str(tmp_path / 'm.json')), skip=True).skipped == 1 and left_out.total() == 1
    with pytest.raises(BadAudioError, match=row['audio_filepath']):
        batch(LazyNeMoIterator(str(tmp_path / 'm.json')), skip=False)


@pytest.mark.parametrize('reader', ['plain', 'tarred', 'with sampling_rate'])
def test_channels_are_mixed_down(tmp_path, reader):
    if reader == 'tarred':
        cuts = tarred(tmp_path, [wav(ramp(1, channels=2)), wav(ramp(1, channels=2))])
    else:
        soundfile.write(tmp_path / 'two.wav', ramp(1, channels=2), RATE, subtype='FLOAT')
        row = {'audio_filepath': 'two.wav', **({'sampling_rate': RATE} if ' ' in reader else {})}
        manifest(tmp_path, row, row)
        cuts = LazyNeMoIterator(str(tmp_path / 'm.json'))
    for samples in batch(cuts, skip=False).audio:
        torch.testing.assert_close(samples, torch.from_numpy(ramp(1) / 4))
