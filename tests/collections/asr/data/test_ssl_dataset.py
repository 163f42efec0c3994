# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from omegaconf import OmegaConf
from tiny_nest import tiny_model
from torch.utils.data import DataLoader

from nemo.collections.asr.data import ssl_dataset
from nemo.collections.asr.data.training_data_mixin import with_own_options
from nemo.utils.left_out import OUTSIDE_LIMITS


def test_noise_is_read_once_whatever_its_mean(tmp_path, monkeypatch):
    """Stock takes noise whose sum is not above 0 for silence, and reads the file up to 100 times."""
    soundfile.write(tmp_path / 'noise.wav', np.full(8000, -0.1), 16000)
    (tmp_path / 'noise.json').write_text(json.dumps({'audio_filepath': 'noise.wav', 'duration': 0.5}))
    load, files = ssl_dataset._up.AudioSegment.from_file, []
    monkeypatch.setattr(
        ssl_dataset._up.AudioSegment, 'from_file', lambda *args, **kwargs: files.append(1) or load(*args, **kwargs)
    )
    noise_data = ssl_dataset.load_noise_manifest(str(tmp_path / 'noise.json'))
    noise, _ = ssl_dataset.sample_noise(noise_data, 16000, max_audio_len=4000)
    assert noise.shape == (4000,) and noise.mean().item() == pytest.approx(-0.1, abs=1e-3) and len(files) == 1


BAD = {
    'junk.wav': 'junk.wav: LibsndfileError: Error opening',
    'gone.wav': 'gone.wav: ',
    'nan.wav': 'nan.wav: samples that are NaN or infinite',
    'infinite.wav': 'infinite.wav: samples that are NaN or infinite',
}


@pytest.fixture(scope='module')
def audio(tmp_path_factory):
    """A folder with three good files of 1.5 s, and each kind of bad ones."""
    folder = tmp_path_factory.mktemp('audio')
    tone = np.sin(np.arange(24000) * 0.05).astype(np.float32) * 0.1
    for name in ('a.wav', 'b.wav', 'c.wav', 'cut.wav'):
        soundfile.write(folder / name, tone, 16000, subtype='FLOAT')
    cut = (folder / 'cut.wav').read_bytes()
    (folder / 'cut.wav').write_bytes(cut[: len(cut) // 10])
    (folder / 'junk.wav').write_bytes(b'RIFF no audio' * 100)
    for name, value in (('nan.wav', np.nan), ('infinite.wav', np.inf)):
        soundfile.write(folder / name, np.where(np.arange(24000) == 777, value, tone), 16000, subtype='FLOAT')
    return folder


def manifest(folder, *names, duration=1.5, **more):
    path = folder / f"{'_'.join(names)}.json"
    rows = [{'audio_filepath': name, 'duration': duration, **more} for name in names]
    path.write_text('\n'.join(map(json.dumps, rows)))
    return str(path)


def data_loader(path, workers=0, batch_size=4, skip_bad_audio=None, **more):
    config = {'manifest_filepath': path, 'sample_rate': 16000, 'batch_size': batch_size, 'shuffle': False, **more}
    dataset = ssl_dataset.get_audio_noise_dataset_from_config(OmegaConf.create(config), 0, 1)
    loader = DataLoader(dataset, batch_size, collate_fn=dataset.collate_fn, num_workers=workers)
    return with_own_options(loader, skip_bad_audio=skip_bad_audio)


@pytest.mark.parametrize('name', BAD)
@pytest.mark.parametrize('workers', [0, 1])
def test_bad_audio_ends_the_epoch_and_is_named(audio, name, workers):
    batches = iter(data_loader(manifest(audio, 'a.wav', 'b.wav', name, 'c.wav'), workers, batch_size=2))
    assert next(batches).audio.shape[0] == 2
    with pytest.raises(ValueError, match='bad audio: ') as error:
        next(batches)
    assert BAD[name].split(':')[0] in str(error.value) and BAD[name].partition(': ')[2] in str(error.value)
    assert 'train_ds.skip_bad_audio: true' in str(error.value)


def test_bad_audio_is_skipped_named_and_counted(audio, warnings):
    path = manifest(audio, 'a.wav', *BAD, 'cut.wav', 'b.wav', 'c.wav', duration=2.5)
    noise = {'batch_augmentor': {'_target_': 'nemo.collections.asr.modules.ssl_modules.MultiSpeakerNoiseAugmentation'}}
    batches = list(data_loader(path, skip_bad_audio=True, **noise))
    assert [(batch.audio.shape[0], batch.skipped) for batch in batches] == [(1, 3), (2, 2)]
    assert all(torch.isfinite(batch.noisy_audio).all() for batch in batches)
    for name in [*BAD, 'cut.wav']:
        assert sum(f'{name}' in message and 'Skipped bad audio' in message for message in warnings) == 1


def test_silence_takes_the_place_of_a_batch_of_nothing_but_bad_audio(audio):
    found = list(data_loader(manifest(audio, 'junk.wav', 'nan.wav', 'a.wav'), batch_size=2, skip_bad_audio=True))
    assert [(batch.is_silence, batch.skipped, len(batch.audio)) for batch in found] == [(True, 2, 1), (False, 0, 1)]
    assert found[0].noisy_audio.abs().max() == 0


def test_audio_that_was_cut_off_is_a_warning_where_nothing_is_skipped(audio, warnings):
    [batch] = data_loader(manifest(audio, 'a.wav', 'cut.wav', duration=3.0))
    assert batch.audio.shape[0] == 2
    assert any('cut.wav lasts' in message and 'may be cut off' in message for message in warnings)


def test_bad_noise_is_not_mixed_in(audio, warnings):
    soundfile.write(audio / 'none.wav', np.zeros(0), 16000)
    for name, why in (('nan.wav', 'samples that are NaN'), ('none.wav', 'there are no samples in it')):
        [batch] = data_loader(manifest(audio, 'a.wav', 'b.wav'), noise_manifest=manifest(audio, name))
        assert torch.equal(batch.audio, batch.noisy_audio)
        assert any(f'{name}: {why}' in message for message in warnings)


def tar(folder, audio, *names):
    with tarfile.open(folder / 'audio_0.tar', 'w') as archive:
        for name in names:
            archive.add(audio / name, name)
    return {'is_tarred': True, 'tarred_audio_filepaths': str(folder / 'audio_0.tar')}


@pytest.mark.parametrize('skip', [False, True])
def test_tarred_audio(audio, tmp_path, skip):
    names = ['a.wav', 'nan.wav', 'junk.wav', 'b.wav']
    loader = data_loader(manifest(audio, *names), skip_bad_audio=skip, **tar(tmp_path, audio, *names))
    if skip:
        assert [(batch.audio.shape[0], batch.skipped) for batch in loader] == [(2, 2)]
    else:
        with pytest.raises(ValueError, match='bad audio: .*nan.wav'):
            list(loader)


@pytest.mark.parametrize('skip', [False, True])
@pytest.mark.parametrize(
    'share, said', [(0.6, 'audio_0.tar is cut off after member'), (1, 'audio_0.tar has no member c')]
)
def test_entries_without_a_member_in_their_tar_file(audio, tmp_path, skip, share, said, left_out):
    tarred = tar(tmp_path, audio, 'a.wav', 'b.wav')
    path = tmp_path / 'audio_0.tar'
    os.truncate(path, int(os.path.getsize(path) * share))
    path = manifest(audio, 'a.wav', 'b.wav', 'c.wav', shard_id=0)
    loader = data_loader(path, skip_bad_audio=skip, max_duration=2.0, **tarred)
    if skip:
        read = sum(len(batch.audio) for batch in loader)
        assert read + left_out.total() == 3 and said in left_out.summary()
    else:
        with pytest.raises(ValueError, match=f'bad audio: .*{said}'):
            list(loader)


def test_a_tarred_manifest_counts_what_the_limits_leave_out(audio, tmp_path, left_out):
    rows = [
        {'audio_filepath': f'{name}.wav', 'duration': seconds} for name, seconds in (('a', 1.5), ('b', 3), ('c', 4))
    ]
    (tmp_path / 'm.json').write_text('\n'.join(map(json.dumps, rows)))
    tarred = tar(tmp_path, audio, 'a.wav')
    data_loader(str(tmp_path / 'm.json'), max_duration=2.0, **tarred)
    assert left_out.reasons()[OUTSIDE_LIMITS][0] == 2
    with pytest.raises(ValueError, match='m.json: no entry lasts from .* to max_duration=1.0'):
        data_loader(str(tmp_path / 'm.json'), max_duration=1.0, **tarred)


@pytest.mark.parametrize('entry', [{}, {'shard_id': 7}])
def test_an_entry_that_no_tar_file_has_is_counted_with_the_first(audio, tmp_path, entry, left_out):
    tars = []
    for number, name in enumerate(('a.wav', 'b.wav')):
        tar(tmp_path, audio, name)
        tars.append(str((tmp_path / 'audio_0.tar').rename(tmp_path / f'part_{number}.tar')))
    path = manifest(audio, 'a.wav', 'b.wav', 'c.wav', **entry)
    loader = data_loader(path, skip_bad_audio=True, is_tarred=True, tarred_audio_filepaths=tars)
    assert sum(len(batch.audio) for batch in loader) == 2
    assert left_out.total() == 1 and 'part_0.tar has no member c' in left_out.summary()


@pytest.mark.parametrize('reader', ['plain', 'tarred'])
def test_audio_that_nemo_would_repeat_or_fill_up_is_counted(audio, tmp_path, reader, left_out):
    """Stock pads to a second, so a file without samples is a second of silence."""
    shutil.copy(audio / 'a.wav', tmp_path)
    for name, length in (('none.wav', 0), ('short.wav', 1600)):
        soundfile.write(tmp_path / name, np.full(length, 0.1), 16000)
    names = ['a.wav', 'none.wav', 'short.wav']
    more = tar(tmp_path, tmp_path, *names) if reader == 'tarred' else {}
    [batch] = data_loader(manifest(tmp_path, *names), skip_bad_audio=True, **more)
    assert batch.skipped == left_out.total() == 2 and 'there are no samples in it' in left_out.summary()


@pytest.mark.parametrize('selector, level', [(None, -0.25), ('average', -0.25), (1, -0.75), ([1], -0.75)])
@pytest.mark.parametrize('reader', ['plain', 'tarred'])
def test_channels_are_mixed_down_or_selected(tmp_path, selector, level, reader):
    samples = np.full((24000, 2), 0.25, dtype=np.float32)
    samples[:, 1] = -0.75
    soundfile.write(tmp_path / 'two.wav', samples, 16000, subtype='FLOAT')
    path, more = manifest(tmp_path, 'two.wav'), tar(tmp_path, tmp_path, 'two.wav') if reader == 'tarred' else {}
    section = dict(manifest_filepath=path, sample_rate=16000, batch_size=1, shuffle=False, noise_manifest=path)
    section = OmegaConf.create({**section, **more, 'channel_selector': selector})
    [batch] = tiny_model()._setup_dataloader_from_config(section)
    assert batch.audio.mean().item() == pytest.approx(level) and batch.noise.mean().item() == pytest.approx(-0.25)


def test_what_lhotse_cannot_read_is_skipped_as_in_nemo_unless_it_must_not_be(audio, tmp_path):
    for name in ('a.wav', 'b.wav'):
        shutil.copy(audio / name, tmp_path / name)
    cuts = CutSet.from_cuts(Recording.from_file(tmp_path / name).to_cut() for name in ('a.wav', 'b.wav')).to_eager()
    (tmp_path / 'b.wav').write_bytes((audio / 'b.wav').read_bytes()[:20])
    dataset = ssl_dataset.LhotseAudioNoiseDataset()
    assert dataset[cuts].skipped == 1  # as in NeMo
    ssl_dataset.set_skip_bad_audio(dataset, True)
    assert dataset[cuts].skipped == 1
    ssl_dataset.set_skip_bad_audio(dataset, False)
    with pytest.raises(ValueError, match=r'bad audio: b \(.*b.wav\): .*skip_bad_audio'):
        dataset[cuts]
    ssl_dataset.set_skip_bad_audio(dataset, True)
    batch = dataset[cuts.subset(last=1)]
    assert batch.is_silence and batch.skipped == 1


@pytest.fixture
def shards(tmp_path):
    """Two noises in a shard: a second and a half of 0.1, and one of 0.2."""
    files = []
    for name, level in (('long', 0.1), ('other', 0.2)):
        soundfile.write(tmp_path / f'{name}.wav', np.full(24000, level), 16000)
        files.append(tmp_path / f'{name}.wav')
    (tmp_path / 'shar').mkdir()
    cuts = CutSet.from_cuts(Recording.from_file(file).to_cut() for file in files)
    cuts.to_shar(tmp_path / 'shar', fields={'recording': 'flac'})
    return tmp_path / 'shar'


def test_noise_comes_from_shards_too(shards):
    with pytest.raises(ValueError, match='noise_manifest .* is a folder, but not one of shards'):
        ssl_dataset.load_noise_manifest(str(shards.parent))
    noises = ssl_dataset.load_noise_manifest(str(shards))
    assert len(noises) == 2 and len(str(noises)) < 500  # NeMo prints what it cannot read
    for noise, level in zip(noises, (0.1, 0.2)):
        for length, sounding in ((16000, 16000), (24000, 24000), (32000, 24000)):
            samples, found = ssl_dataset.load_noise_audio(noise, 16000, length)
            assert (len(samples), int(found)) == (length, sounding)
            assert samples[:sounding].numpy() == pytest.approx(level, abs=1e-3) and not samples[sounding:].any()


def test_cuts_of_other_lengths_get_noise_of_their_own_length(audio, shards):
    dataset = ssl_dataset.LhotseAudioNoiseDataset(noise_manifest=str(shards))
    cuts = [Recording.from_file(audio / name).to_cut() for name in ('a.wav', 'b.wav')]
    cuts[1] = cuts[1].truncate(duration=cuts[1].duration / 2)
    batch = dataset[CutSet.from_cuts(cuts)]
    assert batch.noise.shape == batch.audio.shape == batch.noisy_audio.shape
    short = int(batch.audio_len.min())
    assert batch.noise[1][:short].abs().min() > 0.05 and not batch.noise[1][short:].any()
