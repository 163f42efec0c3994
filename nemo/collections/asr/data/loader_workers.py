# SPDX-License-Identifier: Apache-2.0
"""Workers of data loaders. New in this project."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader


def end_workers_with_their_parent(loader) -> None:
    """Let the workers of a torch data loader end when the process that iterates over it has ended.

    torch's workers look for it only between messages. Cuts with audio are larger than a pipe: within one they would wait forever.
    """
    if isinstance(loader, DataLoader):
        loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)


def _init_worker(own: Callable[[int], None] | None, worker: int) -> None:
    """Start the watch, then run the loader's own function, or Lightning's, which this replaces."""
    threading.Thread(target=_end_with_parent, name='end_with_parent', daemon=True).start()
    if own is not None:
        own(worker)
    elif int(os.environ.get('PL_SEED_WORKERS', 0)):
        pl_worker_init_function(worker)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)  # the main thread may be waiting for a message


def in_order(dataset, workers: int = 0) -> Iterator:
    """Yield the items of a dataset, made by processes; ValueError for an item that is a message."""
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=list)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: another summation order would change the last digits
    try:
        for [item] in loader:
            if isinstance(item, str):
                raise ValueError(item)
            yield item
    finally:
        torch.set_num_threads(threads)
