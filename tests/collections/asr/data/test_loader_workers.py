# SPDX-License-Identifier: Apache-2.0
"""Workers end with the process they load for, whatever they wait for; what the loader's own would do is done."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from corpus import data_section
from fresh_process import run_python
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from tiny_nest import tiny_model
from torch.utils.data import DataLoader, Dataset

from nemo.collections.asr.data.loader_workers import end_workers_with_their_parent

KILLED_WITHIN_A_MESSAGE = """
import os, signal, struct, sys
from torch.utils.data import DataLoader
from nemo.collections.asr.data.loader_workers import end_workers_with_their_parent

loader = DataLoader(list(range(1000)), num_workers=2, batch_size=1)
end_workers_with_their_parent(loader)
batches = iter(loader)
next(batches)
with open(sys.argv[1], 'w') as file:
    file.write(' '.join(str(worker.pid) for worker in batches._workers))
batches._index_queues[0]._writer._send(struct.pack('!i', 100_000) + b'the beginning of a message')
os.kill(os.getpid(), signal.SIGKILL)
"""


class Draws(Dataset):
    """Items that are random numbers."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(1)


def has_ended(process: int) -> bool:
    try:
        state = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == 'Z'


@pytest.mark.integration
@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for processes in /proc')
def test_workers_end_with_a_process_that_is_killed_within_a_message(tmp_path):
    script, pids = tmp_path / 'script.py', tmp_path / 'pids'
    script.write_text(KILLED_WITHIN_A_MESSAGE)
    run_python(script, pids)
    workers = [int(word) for word in pids.read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while not all(map(has_ended, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [worker for worker in workers if not has_ended(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def first_draws(loader) -> list[float]:
    torch.manual_seed(3)
    return [float(batch) for batch in loader]


def draw_otherwise(worker: int) -> None:
    torch.manual_seed(100 + worker)


@pytest.mark.integration
@pytest.mark.parametrize('own', [None, draw_otherwise])
def test_workers_are_seeded_as_lightning_does_or_by_the_loaders_own(monkeypatch, own):
    monkeypatch.setenv('PL_SEED_WORKERS', '1')
    stock, ours = (DataLoader(Draws(), num_workers=2, worker_init_fn=own) for _ in range(2))
    _auto_add_worker_init_fn(stock, rank=0)
    end_workers_with_their_parent(ours)
    assert first_draws(ours) == first_draws(stock)


def names_of_threads(batch) -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.integration
@pytest.mark.parametrize(
    'options',
    [
        {'resumable': {'seed': 1}},
        {'use_lhotse': True, 'use_bucketing': False, 'force_map_dataset': True},
        {'use_lhotse': True, 'use_bucketing': False, 'force_finite': True, 'resumable': {'seed': 1}},
    ],
)
def test_workers_of_a_models_loader_watch_their_parent(options, speech_corpus):
    loader = tiny_model()._setup_dataloader_from_config(data_section(speech_corpus, **options))
    loader.collate_fn = names_of_threads
    assert 'end_with_parent' in next(iter(loader))
