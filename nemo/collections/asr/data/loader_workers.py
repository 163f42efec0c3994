# SPDX-License-Identifier: Apache-2.0
"""Workers of a data loader that end with the process they load for. New in this project.

torch's workers look every five seconds whether that process is still there, but only while they wait for the beginning of
a message. With lhotse the messages are the cuts of a batch, with the audio of shards in them, and larger than a pipe: where
the process is killed within one, its worker waits for the rest for ever, keeps its memory, and keeps open what the
job writes to, so that ``torchrun ... | tee log`` and what waits for it never end.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable

from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader


def end_workers_with_their_parent(loader) -> None:
    """Let the workers of a data loader end when the process that iterates over it has ended, in whatever way.

    Workers that were forked together end one after another, within moments.

    Args:
        loader: a torch data loader that nobody iterates over yet, whose own ``worker_init_fn`` is kept; others are left
            as they are.
    """
    if isinstance(loader, DataLoader):
        loader.worker_init_fn = _InitWorker(loader.worker_init_fn)


class _InitWorker:
    """A ``worker_init_fn``: starts the watch, then does what the loader's own would.

    Args:
        own: the loader's, if it has one; if not, Lightning's where workers are to be seeded, since Lightning gives that only
            to loaders without one.
    """

    def __init__(self, own: Callable[[int], None] | None):
        self.own = own

    def __call__(self, worker: int) -> None:
        threading.Thread(target=_end_with_parent, name='end_with_parent', daemon=True).start()
        if self.own is not None:
            self.own(worker)
        elif int(os.environ.get('PL_SEED_WORKERS', 0)):
            pl_worker_init_function(worker)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # the main thread may be waiting for a message and hears nothing else
