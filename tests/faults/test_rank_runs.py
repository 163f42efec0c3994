# SPDX-License-Identifier: Apache-2.0
"""Two ranks: replicated, sharded, with accumulated gradients, continued on one; and faults of one of them."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from corpus import first_entries, write_manifest
from fresh_process import run_python
from ranks import address_of_ranks
from shared_results import shared_folder
from tiny_nest import restored_weights

from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

pytestmark = pytest.mark.integration
SCRIPT = Path(__file__).resolve().with_name('rank_runs.py')
LONGEST = 60  # seconds within which all ranks end, whatever happens to one
BAD = 'bad.wav'
HALVES = ['plain-half', 'sharded-half', 'folder-half', 'async-half']
RESTS = ['plain-rest', 'sharded-rest', 'sharded-from-async', 'alone', 'alone-from-folder']
SKIPPED = ['unreadable-skipped', 'samples-skipped', 'gradients-skipped']


@pytest.fixture(scope='module')
def manifests(tmp_path_factory, speech_corpus):
    """Short manifests: of valid audio, and with a file among them that is no audio."""

    def make(folder):
        rows = first_entries(speech_corpus / 'train_manifest.json', 16)
        write_manifest(rows, folder / 'short.json')
        (folder / BAD).write_bytes(b'RIFF, and no more')
        rows[5]['audio_filepath'] = str(folder / BAD)
        write_manifest(rows, folder / 'unreadable.json')

    return shared_folder(tmp_path_factory, 'rank_manifests', make)


def run_ranks(name, folder, manifests) -> list[tuple[int | None, str]]:
    """Run on both ranks, or on one; returns the exit status of each, None if it had to be killed, and its output."""
    (folder / name).mkdir()
    ranks, address = 1 if name.startswith('alone') else 2, address_of_ranks()

    def run(rank):
        environment = dict(WORLD_SIZE=str(ranks), RANK=str(rank), LOCAL_RANK=str(rank), **address)
        try:
            done = run_python(SCRIPT, name, folder, manifests, timeout=LONGEST, **environment)
        except subprocess.TimeoutExpired:
            return None, f'killed after {LONGEST} s'
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


@pytest.fixture(scope='module')
def runs(tmp_path_factory, manifests):
    """A folder with all runs that end well."""

    def make(folder):
        for name in ['plain', 'sharded', 'accumulated', *HALVES, *RESTS, *SKIPPED]:
            for rank, (status, output) in enumerate(run_ranks(name, folder, manifests)):
                (folder / name / f'log-{rank}.txt').write_text(output)
                assert status == 0, f'{name}, rank {rank}: {output[-3000:]}'

    return shared_folder(tmp_path_factory, 'rank_runs', make)


def log(runs, name, rank=0):
    return (runs / name / f'log-{rank}.txt').read_text()


def batches(runs, name, rank=0):
    """(step, loss, context, utterances) of each batch."""
    return [json.loads(line) for line in (runs / name / f'steps-{rank}.jsonl').read_text().splitlines()]


def utterances(runs, name, ranks=(0, 1)):
    return [utterance for rank in ranks for *_, names in batches(runs, name, rank) for utterance in names]


def weights(runs, name):
    return restored_weights(runs / name / 'trained.nemo')


def same(one, other, tolerance=0.0) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=tolerance, atol=tolerance) for name in one | other)


def test_sharded_ranks_learn_what_replicated_ones_do(runs):
    for rank in range(2):
        assert batches(runs, 'sharded', rank) == [
            [step, pytest.approx(loss, rel=1e-5), *rest] for step, loss, *rest in batches(runs, 'plain', rank)
        ]
    assert same(weights(runs, 'sharded'), weights(runs, 'plain'), tolerance=1e-5)
    assert not same(weights(runs, 'plain'), weights(runs, 'plain-half'), tolerance=1e-3)


@pytest.mark.parametrize(
    'name, half, rest',
    [
        ('plain', 'plain-half', 'plain-rest'),
        ('sharded', 'sharded-half', 'sharded-rest'),
        ('sharded', 'async-half', 'sharded-from-async'),
    ],
)
def test_a_run_continues_as_if_it_had_never_stopped(runs, name, half, rest):
    for rank in range(2):
        assert batches(runs, half, rank) + batches(runs, rest, rank) == batches(runs, name, rank)
    assert same(weights(runs, rest), weights(runs, name))


@pytest.mark.parametrize('half', ['folder-half', 'async-half'])
def test_a_checkpoint_of_shards_is_a_folder(runs, half):
    (folder,) = (runs / half / 'experiment/checkpoints').glob('*last.ckpt')
    assert (folder / '.metadata').is_file() and len(list(folder.glob('*.distcp'))) == 2


def test_a_checkpoint_that_was_not_written_to_its_end_replaces_none(tmp_path, manifests):
    assert 9 in [status for status, _ in run_ranks('async-killed', tmp_path, manifests)]
    NeMoModelCheckpoint._remove_unfinished_checkpoints(tmp_path / 'async-killed/experiment/checkpoints')
    assert [status for status, _ in run_ranks('sharded-from-killed', tmp_path, manifests)] == [0, 0]
    assert [step for step, *_ in batches(tmp_path, 'sharded-from-killed')] == [3, 4]


@pytest.mark.parametrize('half, name', [('plain-half', 'alone'), ('folder-half', 'alone-from-folder')])
def test_a_run_of_two_ranks_continues_on_one_with_no_utterance_repeated_or_lost(runs, half, name):
    seen, rest = utterances(runs, half), utterances(runs, name, ranks=[0])
    assert len(seen) == 8 and len(rest) == 4 and len({*seen, *rest}) == 12
    assert batches(runs, name)[0][0] == 3  # the step after those of before
    assert '2 ranks had used 8 utterances' in log(runs, name)


@pytest.mark.parametrize('name', ['plain', 'sharded', 'accumulated', 'unreadable-skipped', 'gradients-skipped'])
def test_ranks_have_other_speech_in_the_same_contexts(runs, name):
    first, second = batches(runs, name, 0)[:4], batches(runs, name, 1)[:4]
    assert [row[2] for row in first] == [row[2] for row in second]
    assert not {utterance for row in first for utterance in row[3]} & {u for row in second for u in row[3]}


def test_accumulated_gradients_make_a_step_of_two_batches_of_each_rank(runs):
    rows = batches(runs, 'accumulated')
    assert [row[0] for row in rows] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert rows[0][1:] == batches(runs, 'plain')[0][1:]  # the same weights, the same batch


def test_unreadable_audio_is_left_out_on_the_rank_that_has_it(runs):
    name = 'unreadable-skipped'
    (rank,) = [rank for rank in range(2) if BAD in log(runs, name, rank)]
    assert f'Skipped bad audio on rank {rank}: ' in log(runs, name, rank)
    sizes = [sorted(len(names) for *_, names in batches(runs, name, each)) for each in range(2)]
    assert sizes[rank] == [1, 2, 2, 2] and sizes[1 - rank] == [2, 2, 2, 2]


def test_a_non_finite_utterance_is_dropped_on_its_rank(runs):
    name = 'samples-skipped'
    assert ['Dropped utterance' in log(runs, name, rank) for rank in range(2)] == [False, True]
    assert [len(names) for *_, names in batches(runs, name, 1)] == [2, 1, 2, 2]
    assert all(torch.isfinite(weight).all() for weight in weights(runs, name).values())


def test_a_step_without_finite_gradients_is_skipped_by_all_ranks(runs):
    name = 'gradients-skipped'
    assert [log(runs, name, rank).count('Skipped a step') for rank in range(2)] == [1, 1]
    assert all(torch.isfinite(weight).all() for weight in weights(runs, name).values())
    assert not same(weights(runs, name), weights(runs, 'plain'), tolerance=1e-6)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('unreadable', rf'bad audio on rank (\d): .*{BAD}'),
        ('samples', r'utterance \S+ of a batch on rank (1)'),
        ('empty', r'a batch on rank (1) is empty'),
        ('gradients', r'the gradients of step \d are not all finite'),
    ],
)
def test_a_fault_of_one_rank_ends_all_within_a_minute_and_is_named(tmp_path, manifests, name, message):
    done = run_ranks(name, tmp_path, manifests)
    assert [status for status, _ in done] == [1, 1], [output[-2000:] for _, output in done]
    found = [re.search(message, output) for _, output in done]
    assert not (tmp_path / name / 'trained.nemo').exists()
    if name == 'gradients':  # they are averaged: each rank has them
        assert all(found)
    else:
        (rank,) = [rank for rank, match in enumerate(found) if match]
        assert found[rank][1] == str(rank)
