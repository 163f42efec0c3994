# SPDX-License-Identifier: Apache-2.0
"""Scripts that train on two ranks of this machine."""

import json
import os
import socket
import sys
from pathlib import Path

from fresh_process import run_python


def address_of_ranks() -> dict[str, str]:
    """Return where ranks of this machine meet, as environment variables: at a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(probe.getsockname()[1]))


def run_on_two_ranks(script: Path, folder: Path, names=(0, 1)) -> list[dict]:
    """Run a script that starts its own ranks and writes what they found to FOLDER/NAME.json; return that."""
    done = run_python(script, folder, PYTHONPATH=str(Path(__file__).parent), **address_of_ranks())
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f'{name}.json').read_text()) for name in names]


def run_ranks(find, backend: str | None = None) -> None:
    """Be the main program of such a script: let two forked ranks write what ``find(rank, folder)`` returns.

    Args:
        backend: None: ``find`` starts its process group by itself, by way of Lightning.
    """
    import torch

    from nemo.utils import logging

    logging.setLevel(logging.WARNING)
    folder = Path(sys.argv[1])
    torch.multiprocessing.start_processes(_run_rank, (find, folder, backend), nprocs=2, start_method='fork')


def _run_rank(rank: int, find, folder: Path, backend: str | None) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    if backend is not None:
        torch.distributed.init_process_group(backend, rank=rank, world_size=2)
    (folder / f'{rank}.json').write_text(json.dumps(find(rank, folder)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gloo_ddp():
    """Return Lightning's strategy of two ranks of this machine, each with all weights."""
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(process_group_backend='gloo', cluster_environment=LightningEnvironment())
