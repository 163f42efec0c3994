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

BACKENDS = {'cpu': 'gloo', 'cuda': 'nccl'}


def run_rank(rank: int, folder: Path) -> None:
    """Train with the other rank, and write down what was found."""
    kind = (folder / 'device').read_text()
    device = torch.device(kind, rank) if kind == 'cuda' else torch.device(kind)
    if kind == 'cuda':
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(BACKENDS[kind], rank=rank, world_size=2)
    (folder / f'{rank}.json').write_text(json.dumps(train(rank, device)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # when no wrapped model holds it any more: its end may wait for ever then


def train(rank: int, device: torch.device) -> dict:
    """Train with the other rank; returns the contexts, the losses, and the norms of the gradients."""
    model = model_at(Place(device)).train()
    model._optimizer = optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapped = torch.nn.parallel.DistributedDataParallel(_Step(model))
    found = dict(losses=[], contexts=[])
    for step in range(2):
        loss = wrapped(batch_at(Place(device), seed=10 * rank + step), step)
        loss.backward()
        found['losses'].append(loss.item())
        found['contexts'].append([model.logged['att_context_left'].item(), model.logged['att_context_right'].item()])
        found.setdefault('norms', []).append(gradient_norm(list(model.parameters())))
        optimizer.step()
        optimizer.zero_grad()
        model._trainer.global_step += 1
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found['weights'] = torch.stack([weight.detach().double().sum() for weight in weights]).sum().item()
    return found


class _Step(torch.nn.Module):
    """A training step as a forward, which is what the wrapper calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, index):
        return self.model.training_step(batch, index)['loss']


if __name__ == '__main__':
    logging.setLevel(logging.WARNING)
    torch.multiprocessing.start_processes(run_rank, args=(Path(sys.argv[1]),), nprocs=2, start_method='fork')
