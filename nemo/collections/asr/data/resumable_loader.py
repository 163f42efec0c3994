# SPDX-License-Identifier: Apache-2.0
"""A data loader that resumes exactly in the middle of an epoch. New in this project.

The order of the utterances, and all that is drawn for a batch (noise, masks, dropout), is a pure function of (seed, epoch, batch),
with any number of workers and ranks.
"""

import hashlib
import itertools
import random
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from nemo.collections.asr.parts.utils.config_keys import Resumable
from nemo.utils import logging


class ResumableLoader(DataLoader):
    """A ``DataLoader`` whose state Lightning saves and restores; the seed is for the order and all draws.

    A batch is used when a training step starts on it or, where nothing calls :meth:`start_step`, when it is given.
    """

    def __init__(self, dataset, *, seed: int = 0, **kwargs):
        self._ahead: deque[tuple] = deque()  # places of batches that were given and not used
        self._has_steps = False
        super().__init__(dataset, **kwargs)
        self.seed = seed

    def start_step(self) -> None:
        """Count the next batch as used by a training step, and seed what the step draws."""
        self._has_steps = True
        place = self._ahead.popleft()
        self._use(place)
        self._seed_step(place)

    def __iter__(self) -> Iterator:
        self._ahead.clear()
        return map(self._give, self._placed_batches())  # begins here: Lightning sets the epoch afterwards

    def _give(self, placed: tuple):
        place, batch = placed
        self._ahead.append(place)
        self._seed_step(place)
        return batch

    def _count_used(self) -> None:
        while self._ahead and not self._has_steps:
            self._use(self._ahead.popleft())

    def _seed_step(self, place: tuple) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        seed_generators(self.seed, 'step', torch.distributed.get_rank() if distributed else 0, *place)


class ResumableDataLoader(ResumableLoader):
    """Resumable utterances of plain manifests, :class:`SeededItems`; made by :func:`make_resumable`.

    Under a distributed strategy Lightning replaces the sampler; its rank and number of ranks are used.
    """

    def __init__(self, dataset, *, seed: int = 0, shuffled: bool = True, **kwargs):  # Lightning reads the names
        self._used_before = self._to_skip = 0  # utterances, by all ranks, before this start; and before the next
        self._used = 0  # batches since this start
        self._rest: BatchSampler | None = None
        super().__init__(dataset, seed=seed, **kwargs)
        self.shuffled = shuffled

    @property
    def ranks(self) -> int:
        """The number of ranks that share the data."""
        return getattr(self.sampler, 'num_replicas', 1)

    @property
    def position(self) -> int:
        """The first batch of this start, counted as if the present ranks had begun the epoch."""
        left = -(-len(self.dataset) // self.ranks) - self._used_before // self.ranks
        return len(self) - len(BatchSampler(range(left), self.batch_size, self.drop_last))

    def state_dict(self) -> dict:
        """Return the epoch, and the number of its utterances that all ranks have used."""
        self._count_used()
        epoch, used = self.sampler.epoch, self._used_before + self._used * self.ranks * self.batch_size
        if self._rest is not None and self._used >= len(self._rest):
            epoch, used = epoch + 1, 0
        return {'epoch': epoch, 'used': used, 'ranks': self.ranks}

    def load_state_dict(self, state: dict) -> None:
        """Begin the next epoch where a loader with this state was, on as many ranks or others."""
        self.sampler.set_epoch(state['epoch'])
        self._used_before = self._to_skip = state['used']
        if state['ranks'] != self.ranks and self._to_skip:
            logging.warning(
                f"train_ds.resumable: {state['ranks']} ranks had used {self._to_skip} utterances of epoch {state['epoch']}; "
                f"{self.ranks} continue after these. Fewer than a batch of each rank may come twice."
            )

    def _placed_batches(self) -> Iterator[tuple]:
        self._used_before, self._to_skip, self._used = self._to_skip, 0, 0
        epoch = self.dataset.epoch = self.sampler.epoch  # before the workers take their copies
        rank, seed = getattr(self.sampler, 'rank', 0), derive_seed(self.seed, 'order', epoch)
        share = np.array([*DistributedSampler(self.dataset, self.ranks, rank, self.shuffled, seed)])
        self._rest = BatchSampler(share[self._used_before // self.ranks :], self.batch_size, self.drop_last)
        places = zip(itertools.repeat(epoch), itertools.count(self.position + 1))
        return zip(places, DataLoader.__iter__(self))

    def _use(self, place: tuple) -> None:
        self._used += 1

    def __len__(self) -> int:
        return len(super()._index_sampler)  # of the whole epoch, as Lightning counts

    @property
    def _index_sampler(self):
        return super()._index_sampler if self._rest is None else self._rest


class SeededItems:
    """A dataset that seeds the generators for each batch; a loader's workers fetch whole batches."""

    def __init__(self, dataset, seed: int):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list:
        seed_generators(self.seed, 'data', self.epoch, int(indices[0]))  # which is in no other batch of the epoch
        return [self.dataset[index] for index in indices]


class EpochSampler(torch.utils.data.SequentialSampler):
    """Holds the epoch where Lightning has no distributed sampler; the order is the loader's."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning does."""
        self.epoch = epoch


def make_resumable(loader: DataLoader, options) -> ResumableDataLoader:
    """Return a resumable loader of a plain one's data; ValueError for unknown options or unsupported data."""
    seed = Resumable.parse(options, 'train_ds.resumable').seed
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "train_ds.resumable needs data with positions: plain manifests, or tarred and other data that lhotse reads "
            "(train_ds.use_lhotse: true); concatenated and DALI data have none"
        )
    dataset = SeededItems(loader.dataset, seed)
    names = 'batch_size', 'collate_fn', 'drop_last', 'num_workers', 'pin_memory'
    kept = {name: getattr(loader, name) for name in names}
    shuffled = isinstance(loader.sampler, RandomSampler)
    return ResumableDataLoader(dataset, seed=seed, shuffled=shuffled, sampler=EpochSampler(dataset), **kept)


def seed_generators(*parts) -> None:
    """Seed the generators of Python, NumPy and torch (on all devices) with a function of the parts."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive_seed(*parts) -> int:
    """Return a number below 2**63 that is a function of the parts, numbers and words, on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'big') >> 1
