# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""A data loader that goes on in the middle of an epoch as if it had never stopped. New in this project.

Plain loaders start an epoch anew after a resume: the first utterances come twice, the last never. Here the order of
the utterances, and all that is drawn for a batch (noise, masks, dropout), is a pure function of (seed, epoch, batch):
the same with workers or without, after a kill, on the same number of ranks.
"""

import hashlib
import itertools
import random
from typing import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from nemo.collections.asr.parts.utils.known_keys import RESUMABLE_KEYS, check_known


class ResumableDataLoader(DataLoader):
    """A ``DataLoader`` with the state that Lightning saves and restores; made by :func:`make_resumable`.

    Under a distributed strategy Lightning puts its own sampler in, whose order is a function of (seed, epoch), too.

    Args:
        dataset: :class:`RepeatableItems`.
        seed: of the order and of all draws.
        **kwargs: of ``DataLoader``.
    """

    def __init__(self, dataset, *, seed: int = 0, **kwargs):
        self._skip = self._to_skip = self._given = 0
        super().__init__(dataset, **kwargs)
        self.seed = seed

    def state_dict(self) -> dict:
        """Return where the loader is: an epoch, and the number of its batches that were given out."""
        if self._given >= len(self):
            return {'epoch': self._epoch() + 1, 'batches': 0}
        return {'epoch': self._epoch(), 'batches': self._given}

    def load_state_dict(self, state: dict) -> None:
        """Begin the next epoch where a loader with this state was."""
        self.sampler.set_epoch(state['epoch'])
        self._to_skip = state['batches']

    def __iter__(self) -> Iterator:
        self._skip, self._to_skip = self._to_skip, 0
        self._given = self._skip
        self.dataset.epoch = self._epoch()  # before the workers take their copies
        return self._numbered(super().__iter__(), self._epoch())

    def _numbered(self, batches, epoch: int) -> Iterator:
        for batch in batches:
            self._given += 1
            seed_generators(self.seed, 'step', _rank(), epoch, self._given)
            yield batch

    def _epoch(self) -> int:
        return getattr(self.sampler, 'epoch', 0)

    @property
    def _index_sampler(self):
        return _Rest(super()._index_sampler, self._skip)


class RepeatableItems(Dataset):
    """A dataset of which each batch is loaded with generators seeded for it; a loader's workers ask for whole batches.

    Args:
        dataset: a dataset with a length.
        seed: of the draws.
    """

    def __init__(self, dataset, seed: int):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list:
        seed_generators(self.seed, 'data', self.epoch, indices[0])  # which stands in no other batch of the epoch
        return [self.dataset[index] for index in indices]


class EpochSampler(RandomSampler):
    """Shuffles as a function of (seed, epoch) and of nothing else."""

    def __init__(self, dataset, seed: int):
        super().__init__(dataset)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch's order comes next; Lightning does."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(derive_seed(self.seed, 'order', self.epoch))
        return super().__iter__()


class InOrder(SequentialSampler):
    """Does not shuffle, and knows the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self.epoch = epoch


class _Rest:
    """What a batch sampler gives after the first batches; its length is that of the whole epoch."""

    def __init__(self, batches, skip: int):
        self.batches, self.skip = batches, skip

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        return itertools.islice(self.batches, self.skip, None)


def make_resumable(loader: DataLoader, options) -> ResumableDataLoader:
    """Return a loader of the same data that is resumable.

    Args:
        loader: a plain loader of a dataset with a length.
        options: ``seed`` (default 0), as ``train_ds.resumable`` gives it.

    Raises:
        ValueError: if the options are others, or the data are a stream (tarred, lhotse), which goes its own way.
    """
    check_known('train_ds.resumable', options, RESUMABLE_KEYS)
    seed = options.get('seed', 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"train_ds.resumable.seed is {seed!r}; it must be an integer")
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "train_ds.resumable needs data from plain manifests; tarred, concatenated and lhotse data are streams"
        )
    dataset = RepeatableItems(loader.dataset, seed)
    shuffles = isinstance(loader.sampler, RandomSampler)
    return ResumableDataLoader(
        dataset,
        seed=seed,
        sampler=EpochSampler(dataset, seed) if shuffles else InOrder(dataset),
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )


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


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0
