# SPDX-License-Identifier: Apache-2.0
"""Batches that lhotse makes resume where they were, and each rank reads its share; a whole run is in ``tests/faults``."""

import functools
import json
import random
import tarfile
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.shar.readers.lazy import LazySharIterator
from omegaconf import OmegaConf
from tiny_nest import tiny_model

from nemo.collections.asr.data.resumable_cuts import CutStream
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

RATE = 16000
FILES = 13
LENGTHS = [RATE * (5 + number) // 5 for number in range(FILES)]


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Speech of different lengths, as single files, NeMo's tar files and lhotse Shar; and noise."""
    folder = tmp_path_factory.mktemp('cuts')
    rows = []
    for number, length in enumerate(LENGTHS):
        samples = np.random.default_rng(number).normal(0, 0.1, length)
        soundfile.write(folder / f'{number}.wav', samples, RATE)
        rows.append({'audio_filepath': f'{number}.wav', 'duration': length / RATE, 'text': ''})
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
    cuts = CutSet.from_cuts(Recording.from_file(file).to_cut() for file in files)
    cuts.to_jsonl(folder / 'cuts.jsonl')
    (folder / 'shar').mkdir()
    cuts.to_shar(folder / 'shar', fields={'recording': 'wav'}, shard_size=2)
    return folder


def sections(folder):
    """The data of the tests by name; none ends."""
    lhotse = dict(use_lhotse=True, shuffle_buffer_size=5)
    tarred = dict(manifest_filepath=str(folder / 'tarred.json'))
    tarred['tarred_audio_filepaths'] = str(folder / 'audio__OP_0..1_CL_.tar')
    plain = dict(manifest_filepath=str(folder / 'plain.json'))
    mixed = [
        dict(type='nemo', weight=0.7, **plain),
        dict(type='lhotse_shar', weight=0.3, shar_path=str(folder / 'shar')),
    ]
    buckets = dict(
        use_bucketing=True, bucket_duration_bins=[1.6, 2.6], batch_duration=5.0, batch_size=None, bucket_buffer_size=6
    )
    return {
        'manifest': {**lhotse, **plain},
        'cuts': {**lhotse, 'cuts_path': str(folder / 'cuts.jsonl'), 'perturb_speed': True},
        'bucketed': {**lhotse, **plain, **buckets},
        'shar': {**lhotse, 'shar_path': str(folder / 'shar')},
        'tarred': {**lhotse, **tarred},
        'mixed': {'use_lhotse': True, 'input_cfg': mixed, **buckets},
        'native tarred': {'is_tarred': True, **tarred},
    }


@functools.cache
def one_model():
    """Make the model whose loaders the tests use."""
    return tiny_model()


def loader(folder, name, workers=0, seed=3, rank=0, ranks=1, **more):
    """The loader of one of some simulated ranks."""
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
    model = one_model()
    model.world_size = ranks
    model.__class__ = type('OfARank', (EncDecDenoiseMaskedTokenPredModel,), {'global_rank': rank})
    return model._setup_dataloader_from_config(OmegaConf.create(section))


def batches(data, stop=99):
    """What each batch is, and what a step on it would draw."""
    given = []
    for batch in data:
        audio = batch.noisy_audio.sum().item()
        given.append((batch.audio_len.tolist(), audio, torch.rand(()).item(), random.random()))
        if len(given) == stop:
            break
    return given


def utterances(given):
    return [length for lengths, *_ in given for length in lengths]


@pytest.mark.parametrize(
    ('name', 'workers'),
    [('manifest', 0), ('cuts', 0), ('bucketed', 0), ('shar', 0), ('tarred', 0), ('mixed', 0), ('mixed', 2)],
)
def test_resumes_exactly_in_any_batch_of_several_passes(corpus, name, workers):
    whole = batches(loader(corpus, name, workers), 24)
    assert len({draw for *_, draw in whole}) == 24
    for stop in (3, 14) if workers == 0 else (13,):
        stopped, again = loader(corpus, name, workers), loader(corpus, name, workers)
        assert batches(stopped, stop) == whole[:stop]
        again.load_state_dict(stopped.state_dict())
        assert batches(again, 24 - stop) == whole[stop:]
    assert batches(loader(corpus, name, workers, seed=4), 3) != whole[:3]


@pytest.mark.parametrize(('name', 'workers'), [('bucketed', 0), ('shar', 2), ('native tarred', 0)])
def test_finite_data_end_after_each_utterance_came_once_and_go_on_with_the_next_pass(corpus, name, workers):
    data, again = (loader(corpus, name, workers, force_finite=True) for _ in range(2))
    first, state = batches(data), data.state_dict()
    assert sorted(utterances(first)) == LENGTHS
    second = batches(data)
    assert sorted(utterances(second)) == LENGTHS and second != first
    again.load_state_dict(state)
    assert batches(again, 2) == second[:2]
    again.load_state_dict(again.state_dict())
    assert batches(again) == second[2:]


@pytest.fixture
def counts(monkeypatch):
    """Counts the shards of Shar that are opened, and the cuts that are made of lines and shards."""
    found = Counter()

    def counted(cls, method, name):
        call = getattr(cls, method)

        def count(self):
            result = call(self)
            found[name] += 1
            return result

        monkeypatch.setattr(cls, method, count)

    counted(LazySharIterator, '__iter__', 'opened')
    counted(CutStream, '__next__', 'pulled')
    return found


def test_a_resumed_reader_opens_the_open_shard_only(corpus, counts):
    stopped = loader(corpus, 'shar', shuffle_buffer_size=2)
    batches(stopped, 12)
    assert counts['opened'] >= 12
    again = loader(corpus, 'shar', shuffle_buffer_size=2)
    again.load_state_dict(stopped.state_dict())
    counts.clear()
    batches(again, 1)
    assert counts['opened'] <= 4  # of the segment that was begun, and of the next


@pytest.mark.parametrize('name', ['manifest', 'shar', 'tarred'])
@pytest.mark.parametrize('ranks', [1, 8, 64])
def test_ranks_read_their_share_and_all_utterances_together(corpus, counts, name, ranks):
    seen = []
    for rank in range(ranks):
        data = loader(corpus, name, rank=rank, ranks=ranks, batch_size=1, shuffle_buffer_size=1)
        seen += utterances(batches(data, max(2, FILES // ranks)))
    assert set(seen) == set(LENGTHS)
    assert counts['pulled'] < 1.2 * len(seen)


@pytest.mark.parametrize(('before', 'after'), [(2, 1), (1, 2), (2, 3)])
def test_other_numbers_of_ranks_go_on_with_shards_that_were_not_read(corpus, warnings, before, after):
    states, seen = [], []
    for rank in range(before):
        data = loader(corpus, 'shar', rank=rank, ranks=before, shuffle_buffer_size=2)
        seen += utterances(batches(data, 2 // before))
        states.append(data.state_dict())
    state = {**states[0], 'places': {rank: places for state in states for rank, places in state['places'].items()}}
    rest = []
    for rank in range(after):
        data = loader(corpus, 'shar', rank=rank, ranks=after, shuffle_buffer_size=2)
        data.load_state_dict(state)
        rest += utterances(batches(data, 1))
    assert len(seen) == 4 and len({*seen, *rest}) >= len(seen) + len(rest) - 2 * before
    assert f'{before} readers' in ''.join(warnings)


def test_a_pass_ends_when_its_last_batch_is_used_not_when_it_is_fetched(corpus):
    data, again = (loader(corpus, 'shar', force_finite=True) for _ in range(2))
    given = iter(data)
    next(given), data.start_step()
    for _ in given:  # Lightning fetches a batch ahead, so the end comes before the last step
        pass
    while len(data._ahead) > 1:
        data.start_step()
    again.load_state_dict(data.state_dict())
    assert len(batches(again)) == 1
    data.start_step()
    again.load_state_dict(data.state_dict())
    assert sorted(utterances(batches(again))) == LENGTHS


def test_a_batch_that_is_fetched_ahead_of_the_step_is_not_lost(corpus):
    whole, data, again = (loader(corpus, 'shar') for _ in range(3))
    whole, given = batches(whole, 4), iter(data)
    next(given), data.start_step()
    first = torch.rand(()).item()
    next(given)  # Lightning does, where a loader has no length
    again.load_state_dict(data.state_dict())
    assert first == whole[0][2] and batches(again, 3) == whole[1:]


@pytest.mark.parametrize(
    ('name', 'more', 'message'),
    [
        ('manifest', {'concurrent_bucketing': True}, 'train_ds.concurrent_bucketing is True'),
        ('shar', {'force_map_dataset': True}, 'train_ds.force_map_dataset is True'),
        ('manifest', {'multi_config': True}, 'train_ds.multi_config is True'),
        ('mixed', {'max_open_streams': 2}, 'train_ds.max_open_streams is 2'),
        ('native tarred', {'is_concat': True}, 'train_ds.is_concat is True; .*use_lhotse: true'),
        ('shar', {'resumable': {'seed': 'x'}}, "train_ds.resumable.seed is 'x'"),
        ('shar', {'force_finite': True, 'ranks': 2}, 'train_ds.force_finite is true on 2 ranks; .*limit_train'),
    ],
)
def test_refuses_what_cannot_be_exact(corpus, name, more, message):
    with pytest.raises(ValueError, match=message):
        loader(corpus, name, **more)
