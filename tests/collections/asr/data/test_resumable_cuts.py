# SPDX-License-Identifier: Apache-2.0
"""Batches that lhotse makes are given on from where they were; a whole run is in ``tests/faults``."""

import json
import random
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from omegaconf import OmegaConf
from tiny_nest import tiny_model

RATE = 16000
FILES = 13


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Speech of other lengths, as single files, NeMo's tar files and lhotse Shar; and noise."""
    folder = tmp_path_factory.mktemp('cuts')
    rows = []
    for number in range(FILES):
        samples = np.random.default_rng(number).normal(0, 0.1, RATE * (5 + number) // 5)
        soundfile.write(folder / f'{number}.wav', samples, RATE)
        rows.append({'audio_filepath': f'{number}.wav', 'duration': len(samples) / RATE, 'text': ''})
    (folder / 'plain.json').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (folder / 'noise.json').write_text(''.join(json.dumps(row) + '\n' for row in rows[:4]))
    tarred = []
    for shard in (0, 1):
        with tarfile.open(folder / f'audio_{shard}.tar', 'w') as archive:
            for row in rows[shard::2]:
                archive.add(folder / row['audio_filepath'], row['audio_filepath'])
                tarred.append({**row, 'shard_id': shard})
    (folder / 'tarred.json').write_text(''.join(json.dumps(row) + '\n' for row in tarred))
    files = [str(folder / f'{number}.wav') for number in range(FILES)]
    from lhotse import Recording

    cuts = CutSet.from_cuts(Recording.from_file(file).to_cut() for file in files)
    (folder / 'shar').mkdir()
    cuts.to_shar(folder / 'shar', fields={'recording': 'wav'}, shard_size=4)
    return folder


def sections(folder):
    """The data of the tests by name; all but the last come to an end."""
    lhotse = dict(use_lhotse=True, force_finite=True, shuffle_buffer_size=20)
    tarred = dict(manifest_filepath=str(folder / 'tarred.json'))
    tarred['tarred_audio_filepaths'] = str(folder / 'audio__OP_0..1_CL_.tar')
    plain = dict(manifest_filepath=str(folder / 'plain.json'))
    mixed = [
        dict(type='nemo', weight=0.7, **plain),
        dict(type='lhotse_shar', weight=0.3, shar_path=str(folder / 'shar')),
    ]
    buckets = dict(use_bucketing=True, num_buckets=3, batch_duration=5.0, batch_size=None, bucket_buffer_size=20)
    return {
        'manifest': {**lhotse, **plain},
        'bucketed': {**lhotse, **plain, **buckets},
        'shar': {**lhotse, 'shar_path': str(folder / 'shar')},
        'tarred': {'is_tarred': True, **tarred},
        'mixed': {'use_lhotse': True, 'shuffle_buffer_size': 20, 'input_cfg': mixed, **buckets},
    }


def loader(folder, name, workers=0, seed=3, model=None, **more):
    section = {
        'sample_rate': RATE,
        'batch_size': 2,
        'shuffle': True,
        'num_workers': workers,
        'noise_manifest': str(folder / 'noise.json'),
        'resumable': {'seed': seed},
        **sections(folder)[name],
        **more,
    }
    model = model or tiny_model()
    return model._setup_dataloader_from_config(OmegaConf.create(section))


def epoch(batches, number, stop=9):
    """What each batch of an epoch is, and what a step on it would draw."""
    batches.sampler.set_epoch(number)
    given = []
    for batch in batches:
        given.append(
            (batch.audio_len.tolist(), batch.noisy_audio.sum().item(), torch.rand(()).item(), random.random())
        )
        if len(given) == stop:
            break
    return given


@pytest.mark.parametrize('name', ['manifest', 'bucketed', 'shar', 'tarred', 'mixed'])
@pytest.mark.parametrize('workers', [0, 2])
def test_goes_on_where_it_was_with_any_number_of_workers(corpus, name, workers):
    whole = [epoch(loader(corpus, name), number) for number in (0, 1)]
    assert whole[0] != whole[1] and len(whole[1]) >= 4
    stopped, again = loader(corpus, name, workers), loader(corpus, name, 2 - workers)
    assert epoch(stopped, 0) == whole[0] and epoch(stopped, 1, stop=3) == whole[1][:3]
    again.load_state_dict(stopped.state_dict())
    assert epoch(again, 1, stop=len(whole[1]) - 3) == whole[1][3:]
    assert epoch(again, 0) == whole[0]
    assert epoch(loader(corpus, name, seed=4), 0) != whole[0]


@pytest.mark.parametrize('name', ['manifest', 'bucketed', 'shar', 'tarred'])
def test_an_epoch_has_each_utterance_once_and_is_followed_by_the_next(corpus, name):
    batches, again = loader(corpus, name), loader(corpus, name)
    lengths = [length for batch in batches for length in batch.audio_len.tolist()]
    assert sorted(lengths) == sorted(RATE * (5 + number) // 5 for number in range(FILES))
    state = batches.state_dict()
    assert (state['epoch'], state['used']) == (1, 0)
    again.load_state_dict(state)
    assert epoch(again, again.sampler.epoch) == epoch(loader(corpus, name), 1)


def rank_of(model, rank, ranks):
    """A model that believes to be one of some ranks."""
    model.world_size = ranks
    model.__class__ = type('OfARank', (type(model),), {'global_rank': rank})
    return model


def shares(folder, name, ranks, number, stop=99, state=None):
    """The lengths of the utterances that each rank is given, by batch, and the state that the first rank leaves."""
    given, left = [], None
    for rank in range(ranks):
        batches = loader(folder, name, model=rank_of(tiny_model(), rank, ranks))
        if state:
            batches.load_state_dict(state)
        given.append([lengths for lengths, *_ in epoch(batches, number, stop)])
        left = left or batches.state_dict()
    return given, left


@pytest.mark.parametrize('name', ['manifest', 'bucketed', 'shar'])
@pytest.mark.parametrize('before, after', [(2, 2), (2, 1), (1, 2)])
def test_goes_on_with_other_ranks_without_repeating_or_losing_more_than_a_batch_of_each(corpus, name, before, after):
    whole, _ = shares(corpus, name, before, 1)
    first, state = shares(corpus, name, before, 1, stop=2)
    second, _ = shares(corpus, name, after, 1, state=state)
    if before == after:
        assert [one + two for one, two in zip(first, second)] == whole
    everything = sorted(length for share in (*first, *second) for batch in share for length in batch)
    missed = len(set(RATE * (5 + number) // 5 for number in range(FILES)) - set(everything))
    assert missed == 0 and len(everything) - FILES <= 2 * after
    assert len({len(share) for share in second}) == 1


@pytest.mark.parametrize(
    'name, more, message',
    [
        ('manifest', {'shard_seed': 'trng'}, "train_ds.shard_seed is 'trng', another one in each process"),
        ('manifest', {'concurrent_bucketing': True}, 'train_ds.concurrent_bucketing is true; .* a thread fills'),
        ('shar', {'force_iterable_dataset': True}, 'train_ds.force_iterable_dataset is true; .* needs it false'),
        ('manifest', {'multi_config': True}, 'train_ds.multi_config is true; .*input_cfg mixes'),
        ('tarred', {'is_concat': True}, 'train_ds.is_concat is set; .*set use_lhotse: true'),
        ('shar', {'resumable': {'seed': 'x'}}, "train_ds.resumable.seed is 'x'"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(corpus, name, more, message):
    with pytest.raises(ValueError, match=message):
        loader(corpus, name, **more)


def test_the_generators_of_the_process_are_left_alone(corpus):
    batches = loader(corpus, 'manifest', workers=1)
    torch.manual_seed(0)
    random.seed(0)
    for _ in batches.sampler:
        pass
    drawn = torch.rand(()).item(), random.random()
    torch.manual_seed(0)
    random.seed(0)
    assert drawn == (torch.rand(()).item(), random.random())
