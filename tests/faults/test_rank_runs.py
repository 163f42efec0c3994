# SPDX-License-Identifier: Apache-2.0
"""Two ranks: replicated, sharded, with accumulated gradients, going on on one; and faults that strike one of them."""

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

HERE = Path(__file__).resolve().parent

SCRIPT = HERE / 'rank_runs.py'
LONGEST = 60  # seconds within which all ranks end, whatever happened to one
UTTERANCES, BAD = 16, 'bad.wav'
WELL = [
    'plain',
    'sharded',
    'accumulated',
    'plain-half',
    'sharded-half',
    'plain-rest',
    'sharded-rest',
    'alone',
    'alone-from-sharded',
    'folder-half',
    'sharded-from-folder',
    'alone-from-folder',
    'unreadable-skipped',
    'samples-skipped',
    'gradients-skipped',
]
ON_ONE_RANK = ('alone', 'alone-from-sharded', 'alone-from-folder')


@pytest.fixture(scope='module')
def manifests(tmp_path_factory, speech_corpus):
    """Short manifests: all sound, and with a file in their midst that is no audio."""

    def make(folder):
        rows = first_entries(speech_corpus / 'train_manifest.json', UTTERANCES)
        write_manifest(rows, folder / 'short.json')
        (folder / BAD).write_bytes(b'RIFF, and no more')
        rows[5]['audio_filepath'] = str(folder / BAD)
        write_manifest(rows, folder / 'unreadable.json')

    return shared_folder(tmp_path_factory, 'rank_manifests', make)


def run_ranks(name, folder, manifests) -> list[tuple[int, str]]:
    """Run on both ranks, or on one; returns the exit status of each, None if it had to be killed, and what it said."""
    (folder / name).mkdir()
    ranks = 1 if name in ON_ONE_RANK else 2
    address = address_of_ranks()

    def run(rank):
        environment = dict(WORLD_SIZE=str(ranks), RANK=str(rank), LOCAL_RANK=str(rank), **address)
        words = [SCRIPT, name, folder, manifests]
        try:
            done = run_python(*words, timeout=LONGEST, PYTHONPATH=str(HERE.parent), **environment)
        except subprocess.TimeoutExpired:
            return None, f'killed after {LONGEST} s'
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


@pytest.fixture(scope='module')
def runs(tmp_path_factory, manifests):
    """A folder with all runs that end well."""

    def make(folder):
        for name in WELL:
            for rank, (status, said) in enumerate(run_ranks(name, folder, manifests)):
                (folder / name / f'log-{rank}.txt').write_text(said)
                assert status == 0, f'{name}, rank {rank}: {said[-3000:]}'

    return shared_folder(tmp_path_factory, 'rank_runs', make)


def batches(runs, name, rank=0):
    """(step, loss, context, utterances) of each batch."""
    return [json.loads(line) for line in (runs / name / f'steps-{rank}.jsonl').read_text().splitlines()]


def weights(runs, name):
    return restored_weights(runs / name / 'trained.nemo')


def same(one, other, tolerance=0.0) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=tolerance, atol=tolerance) for name in one | other)


@pytest.mark.integration
def test_sharded_ranks_learn_what_replicated_ones_do(runs):
    for rank in range(2):
        assert batches(runs, 'sharded', rank) == [
            [step, pytest.approx(loss, rel=1e-5), *rest] for step, loss, *rest in batches(runs, 'plain', rank)
        ]
    assert same(weights(runs, 'sharded'), weights(runs, 'plain'), tolerance=1e-5)
    assert not same(weights(runs, 'plain'), weights(runs, 'plain-half'), tolerance=1e-3)


@pytest.mark.integration
@pytest.mark.parametrize('name', ['plain', 'sharded'])
def test_a_run_goes_on_as_if_it_had_never_stopped(runs, name):
    for rank in range(2):
        whole = batches(runs, name, rank)
        assert batches(runs, f'{name}-half', rank) + batches(runs, f'{name}-rest', rank) == whole
    assert same(weights(runs, f'{name}-rest'), weights(runs, name))


@pytest.mark.integration
def test_a_checkpoint_of_shards_goes_on_as_one_file_does(runs):
    for rank in range(2):
        assert batches(runs, 'sharded-from-folder', rank) == batches(runs, 'sharded-rest', rank)
    assert same(weights(runs, 'sharded-from-folder'), weights(runs, 'sharded-rest'))
    (folder,) = (runs / 'folder-half/experiment/checkpoints').glob('*last.ckpt')
    assert (folder / '.metadata').is_file() and len(list(folder.glob('*.distcp'))) == 2


@pytest.mark.integration
@pytest.mark.parametrize('name', ['alone', 'alone-from-sharded', 'alone-from-folder'])
def test_what_two_ranks_began_goes_on_on_one_with_nothing_repeated_or_lost(runs, name):
    before = {'alone-from-sharded': 'sharded-half', 'alone-from-folder': 'folder-half'}.get(name, 'plain-half')
    seen = [utterance for rank in range(2) for *_, names in batches(runs, before, rank) for utterance in names]
    rest = [utterance for *_, names in batches(runs, name) for utterance in names]
    assert len(seen) == 8 and len(rest) == 4 and len({*seen, *rest}) == 12
    assert batches(runs, name)[0][0] == 3  # the step after those of before
    assert '2 ranks had used 8 utterances' in (runs / name / 'log-0.txt').read_text()


@pytest.mark.integration
@pytest.mark.parametrize('name', ['plain', 'sharded', 'accumulated', 'unreadable-skipped', 'gradients-skipped'])
def test_ranks_hear_other_speech_in_the_same_contexts(runs, name):
    first, second = batches(runs, name, 0), batches(runs, name, 1)
    assert [row[2] for row in first] == [row[2] for row in second]
    assert not {utterance for row in first[:4] for utterance in row[3]} & {u for row in second[:4] for u in row[3]}


@pytest.mark.integration
def test_accumulated_gradients_make_a_step_of_two_batches_of_each_rank(runs):
    rows = batches(runs, 'accumulated')
    assert len(rows) == 8 and [row[0] for row in rows] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert rows[0][1:] == batches(runs, 'plain')[0][1:]  # the same weights, the same batch


@pytest.mark.integration
def test_what_cannot_be_read_is_left_out_on_the_rank_that_has_it(runs):
    logs = [(runs / 'unreadable-skipped' / f'log-{rank}.txt').read_text() for rank in range(2)]
    (rank,) = [rank for rank, log in enumerate(logs) if BAD in log]
    assert f'Skipped bad audio on rank {rank}: ' in logs[rank]
    sizes = [sorted(len(names) for *_, names in batches(runs, 'unreadable-skipped', each)) for each in range(2)]
    assert sizes[rank] == [1, 2, 2, 2] and sizes[1 - rank] == [2, 2, 2, 2]


@pytest.mark.integration
def test_an_utterance_that_is_no_number_is_dropped_on_its_rank(runs):
    assert 'Dropped utterance' in (log := (runs / 'samples-skipped/log-1.txt').read_text()) and 'on rank 1' in log
    assert 'Dropped utterance' not in (runs / 'samples-skipped/log-0.txt').read_text()
    assert [len(names) for *_, names in batches(runs, 'samples-skipped', 1)] == [2, 1, 2, 2]
    assert all(torch.isfinite(weight).all() for weight in weights(runs, 'samples-skipped').values())


@pytest.mark.integration
def test_a_step_without_finite_gradients_is_skipped_by_all_ranks(runs):
    for rank in range(2):
        assert (runs / f'gradients-skipped/log-{rank}.txt').read_text().count('Skipped a step') == 1
    assert all(torch.isfinite(weight).all() for weight in weights(runs, 'gradients-skipped').values())
    assert not same(weights(runs, 'gradients-skipped'), weights(runs, 'plain'), tolerance=1e-6)


@pytest.mark.integration
@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('unreadable', rf'bad audio on rank (\d): .*{BAD}'),
        ('samples', r'utterance \S+ of a batch on rank (1) has samples that are NaN'),
        ('empty', r'a batch on rank (1) is empty'),
        ('gradients', r'the gradients of step \d are not all finite'),
    ],
)
def test_a_fault_of_one_rank_ends_all_within_a_minute_and_is_named(tmp_path, manifests, name, message):
    done = run_ranks(name, tmp_path, manifests)
    assert [status for status, _ in done] == [1, 1], [said[-2000:] for _, said in done]
    found = [re.search(message, said) for _, said in done]
    if name == 'gradients':  # they are averaged: each rank has them
        assert all(found)
        return
    (rank,) = [rank for rank, match in enumerate(found) if match]
    assert found[rank][1] == str(rank)
    assert not (tmp_path / name / 'trained.nemo').exists()
