# SPDX-License-Identifier: Apache-2.0
"""A distributed training of each objective on two CPU processes; run by test_ssl_models_objectives.py.

Usage: objectives_run.py FOLDER, with MASTER_ADDR and MASTER_PORT set. Leaves FOLDER/RANK.json: what the weights add up to.
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

from nemo.utils import logging

SECONDS = [(0.9, 0.5), (1.1,)]  # another batch size and length on each rank


def train(objective: str, rank: int) -> dict:
    """Train five steps."""
    model = tiny_model(f'+model.objective={objective}')
    strategy = DDPStrategy(process_group_backend='gloo', cluster_environment=LightningEnvironment())
    loader = DataLoader([noise_batch(SECONDS[rank], seed) for seed in range(5)], batch_size=None)
    run = fit(model, loader, 5, devices=2, strategy=strategy)
    weights = sum(weight.double().abs().sum() for weight in model.parameters())
    return {'weights': weights.item(), 'losses': run.global_step}


def run_rank(rank: int, folder: Path) -> None:
    os.environ['LOCAL_RANK'] = str(rank)
    results = {objective: train(objective, rank) for objective in ('next_token', 'both')}
    (folder / f'{rank}.json').write_text(json.dumps(results))


if __name__ == '__main__':
    logging.setLevel(logging.WARNING)
    # Forked, for one import of NeMo instead of two.
    torch.multiprocessing.start_processes(run_rank, (Path(sys.argv[1]),), nprocs=2, start_method='fork')
