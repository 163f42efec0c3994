# SPDX-License-Identifier: Apache-2.0
"""A training on two CPU processes, one of which meets a batch without a valid utterance; run by test_nonfinite_guard.py.

Usage: invalid_batch_run.py FOLDER, with MASTER_ADDR and MASTER_PORT set. Leaves FOLDER/RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from tiny_nest import fit, noise_batch, tiny_model
from torch.utils.data import DataLoader


def run_rank(rank: int, folder: Path) -> None:
    os.environ['LOCAL_RANK'] = str(rank)
    model = tiny_model('model.skip_nan_grad=true')
    strategy = DDPStrategy(process_group_backend='gloo', cluster_environment=LightningEnvironment())
    given = [noise_batch((0.9, 0.5), seed=2 * step + rank) for step in range(3)]
    if rank == 1:
        given[1].audio.fill_(float('nan'))
    fit(model, DataLoader(given, batch_size=None), 3, devices=2, strategy=strategy)
    weights = sum(weight.double().abs().sum() for weight in model.parameters()).item()
    found = {'steps': model._skipped_steps, 'utterances': model._skipped_utterances, 'weights': weights}
    (folder / f'{rank}.json').write_text(json.dumps(found))


if __name__ == '__main__':
    # Forked, for one import of NeMo instead of two.
    torch.multiprocessing.start_processes(run_rank, (Path(sys.argv[1]),), nprocs=2, start_method='fork')
