# SPDX-License-Identifier: Apache-2.0
"""Two steps on two ranks, by NCCL on two GPUs or by Gloo on two CPU processes; run by test_on_cuda.py.

Usage: two_ranks.py FOLDER, with MASTER_ADDR and MASTER_PORT set, and ``cpu`` or ``cuda`` in FOLDER/device. Each rank has
a batch of its own. Leaves FOLDER/RANK.json.
"""

import json
import sys
from pathlib import Path

import torch
from device.model_scenarios import batch_at, model_at
from device.place import Place

from nemo.collections.asr.parts.utils.nonfinite_guard import gradient_norm
from nemo.utils import logging


def run_rank(rank: int, folder: Path) -> None:
    """Train with the other rank, and write the result."""
    kind = (folder / 'device').read_text()
    if kind == 'cuda':
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    torch.distributed.init_process_group({'cpu': 'gloo', 'cuda': 'nccl'}[kind], rank=rank, world_size=2)
    found = train(rank, torch.device(kind, rank) if kind == 'cuda' else torch.device(kind))
    (folder / f'{rank}.json').write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # only when no wrapped model holds it: else it may wait for ever


def train(rank: int, device: torch.device) -> dict:
    """Train with the other rank; returns contexts, losses, norms of the gradients, and the sum of the weights."""
    model = model_at(Place(device)).train()
    model._optimizer = optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.forward = model.training_step  # what the wrapper calls
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    found = dict(losses=[], contexts=[], norms=[])
    for step in range(2):
        loss = wrapped(batch_at(Place(device), seed=10 * rank + step), step)['loss']
        loss.backward()
        found['losses'].append(loss.item())
        found['contexts'].append([model.logged['att_context_left'].item(), model.logged['att_context_right'].item()])
        found['norms'].append(gradient_norm(list(model.parameters())))
        optimizer.step()
        optimizer.zero_grad()
        model._trainer.global_step += 1
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return {**found, 'weights': sum(weight.detach().double().sum().item() for weight in weights)}


if __name__ == '__main__':
    logging.setLevel(logging.WARNING)
    torch.multiprocessing.start_processes(run_rank, args=(Path(sys.argv[1]),), nprocs=2, start_method='fork')
