# SPDX-License-Identifier: Apache-2.0
"""A distributed training of each objective on two CPU processes; run by test_ssl_models_objectives.py.

Usage: objectives_run.py FOLDER, with MASTER_ADDR and MASTER_PORT set. Leaves FOLDER/RANK.json: what the weights add up to.
"""

from ranks import gloo_ddp, run_ranks
from tiny_nest import fit, noise_batch, tiny_model
from torch.utils.data import DataLoader

SECONDS = [(0.9, 0.5), (1.1,)]  # another batch size and length on each rank


def train(objective: str, rank: int) -> dict:
    """Train five steps."""
    model = tiny_model(f'+model.objective={objective}')
    loader = DataLoader([noise_batch(SECONDS[rank], seed) for seed in range(5)], batch_size=None)
    run = fit(model, loader, 5, devices=2, strategy=gloo_ddp())
    weights = sum(weight.double().abs().sum() for weight in model.parameters())
    return {'weights': weights.item(), 'losses': run.global_step}


if __name__ == '__main__':
    run_ranks(lambda rank, folder: {objective: train(objective, rank) for objective in ('next_token', 'both')})
