# SPDX-License-Identifier: Apache-2.0
"""A data loader that goes on in the middle of an epoch as if it had never stopped. New in this project.

Plain loaders start an epoch anew after a resume: the first utterances come twice, the last never. Here the order of
the utterances, and all that is drawn for a batch (noise, masks, dropout), is a pure function of (seed, epoch, batch):
the same with workers or without, after a kill, on the same number of ranks. On another number of ranks the order of the
epoch stays, and each goes on where all of them together had been.

``resumable_cuts.py`` has the same for data that lhotse reads.
"""

import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from nemo.collections.asr.parts.utils.config_keys import Resumable
from nemo.utils import logging


class ResumableLoader(DataLoader):
    """A ``DataLoader`` with the state that Lightning saves and restores.

    What all ranks together have used of an epoch is counted in units: utterances of plain manifests, batches of cuts.

    Args:
        dataset: of the data.
        seed: of the order and of all draws.
        **kwargs: of ``DataLoader``.
    """

    unit = 'utterances'

    def __init__(self, dataset, *, seed: int = 0, **kwargs):
        self._used_before = self._to_pass = 0  # units, by all ranks, before this start; and before the next
        self._given = 0  # batches, since this start
        self._steps: int | None = None  # of training, since this start; None: nobody tells
        super().__init__(dataset, **kwargs)
        self.seed = seed

    @property
    def ranks(self) -> int:
        """How many ranks share the data."""
        return getattr(self.sampler, 'num_replicas', 1)

    @property
    def position(self) -> int:
        """The batches of this epoch that were handed out."""
        """The first batch of this start, counted as if the present ranks had begun the epoch."""
        return self._used_before // (self.ranks * self._units_of_a_batch)

    @property
    def next_batch(self) -> int:
        """The batch of the epoch that comes next, counted as if the present ranks had begun it."""
        return self.position + self._given

    def start_step(self) -> None:
        """Say that a training step takes the next batch; Lightning may have asked for the one after it.

        Seeds the generators for what the step draws.
        """
        self._steps = (self._steps or 0) + 1
        seed_generators(self.seed, 'step', _rank(), self._epoch(), self.position + self._steps)

    def state_dict(self) -> dict:
        """Return where the loader is: an epoch, and what all ranks have used of it."""
        used = self._given if self._steps is None else min(self._steps, self._given)
        epoch, units = self._epoch(), self._used_before + used * self.ranks * self._units_of_a_batch
        if self._is_over(used):
            epoch, units = epoch + 1, 0
        return {
            'epoch': epoch,
            'batches': units // (self.ranks * self._units_of_a_batch),
            'used': units,
            'ranks': self.ranks,
        }

    def load_state_dict(self, state: dict) -> None:
        """Begin the next epoch where a loader with this state was, on as many ranks or others."""
        self.sampler.set_epoch(state['epoch'])
        here = state['batches'] * self.ranks * self._units_of_a_batch  # version 0.1 kept no more
        self._used_before = self._to_pass = state.get('used', here)
        ranks = state.get('ranks', self.ranks)
        if ranks != self.ranks and self._to_pass:
            logging.warning(
                f"train_ds.resumable: {ranks} ranks had used {self._to_pass} {self.unit} of epoch {state['epoch']}; "
                f"{self.ranks} go on after these. Fewer than a batch of each rank may come twice."
            )

    def __iter__(self) -> Iterator:
        self._used_before, self._to_pass = self._to_pass, 0
        self._given, self._steps = 0, None
        self._begin_epoch(self._epoch(), self._used_before)
        return self._numbered(super().__iter__(), self._epoch(), self.position)

    def _numbered(self, batches, epoch: int, position: int) -> Iterator:
        for batch in batches:
            self._given += 1
            seed_generators(self.seed, 'step', _rank(), epoch, position + self._given)
            yield batch
        self._after_the_last()

    def _epoch(self) -> int:
        return getattr(self.sampler, 'epoch', 0)

    @property
    def _units_of_a_batch(self) -> int:
        return 1

    def _begin_epoch(self, epoch: int, used: int) -> None:
        """Make ready to give what is left of an epoch of which all ranks have used so many units."""
        raise NotImplementedError

    def _is_over(self, batches: int) -> bool:
        """Whether nothing is left of the epoch after so many batches of this start."""
        raise NotImplementedError

    def _after_the_last(self) -> None:
        """Take note that the data has come to its end."""


class ResumableDataLoader(ResumableLoader):
    """Resumable utterances of plain manifests; made by :func:`make_resumable`.

    Under a distributed strategy Lightning puts its own sampler in; what is taken from that is who has which share.

    Args:
        dataset: :class:`RepeatableItems`.
        shuffled: whether the order is another in each epoch.
        **kwargs: of :class:`ResumableLoader`.
    """

    def __init__(self, dataset, *, seed: int = 0, shuffled: bool = True, **kwargs):  # Lightning reads the names
        self._rest: BatchSampler | None = None
        super().__init__(dataset, seed=seed, **kwargs)
        self.shuffled = shuffled

    @property
    def _units_of_a_batch(self) -> int:
        return self.batch_size

    def _begin_epoch(self, epoch, used):
        self.dataset.epoch = epoch  # before the workers take their copies
        share = _Indices(self._share(epoch)[used // self.ranks :])
        self._rest = BatchSampler(share, self.batch_size, self.drop_last)

    def _share(self, epoch: int) -> np.ndarray:
        """Return the utterances of this rank in the order of an epoch; all ranks have equally many."""
        indices = np.arange(len(self.dataset))
        if self.shuffled:
            indices = EpochSampler.order(len(self.dataset), self.seed, epoch).numpy()
        missing = -len(indices) % self.ranks
        return np.resize(indices, len(indices) + missing)[getattr(self.sampler, 'rank', 0) :: self.ranks]

    def _is_over(self, batches):
        return self._rest is not None and batches >= len(self._rest)

    @property
    def position(self) -> int:
        """The batches of this epoch that were handed out."""
        left = -(-len(self.dataset) // self.ranks) - self._used_before // self.ranks
        return len(self) - len(BatchSampler(range(left), self.batch_size, self.drop_last))

    @property
    def _index_sampler(self):
        whole = super()._index_sampler
        return whole if self._rest is None else _Rest(self._rest, len(whole))


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
        return iter(_Indices(self.order(len(self.data_source), self.seed, self.epoch).numpy()))

    @staticmethod
    def order(items: int, seed: int, epoch: int) -> torch.Tensor:
        """Return an epoch's order, int64 [items]."""
        return torch.randperm(items, generator=torch.Generator().manual_seed(derive_seed(seed, 'order', epoch)))


class InOrder(SequentialSampler):
    """Does not shuffle, and knows the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self.epoch = epoch


class _Indices:
    """Numbers of utterances; a list of a million Python numbers would take 40 MB."""

    def __init__(self, indices: np.ndarray):
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return map(int, self.indices)


class _Rest:
    """The batches that are left of an epoch; its length is that of the whole epoch, as Lightning counts."""

    def __init__(self, batches, length: int):
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator:
        return iter(self.batches)


def make_resumable(loader: DataLoader, options) -> ResumableDataLoader:
    """Return a loader of the same data that is resumable.

    Args:
        loader: a plain loader of a dataset with a length.
        options: ``seed`` (default 0), as ``train_ds.resumable`` gives it.

    Raises:
        ValueError: if the options are others, or the data are a stream whose position nobody knows.
    """
    seed = seed_of(options)
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "train_ds.resumable needs data whose position can be told: plain manifests, or tarred and other data that "
            "lhotse reads (train_ds.use_lhotse: true); concatenated and DALI data are streams of their own"
        )
    dataset = RepeatableItems(loader.dataset, seed)
    shuffles = isinstance(loader.sampler, RandomSampler)
    return ResumableDataLoader(
        dataset,
        seed=seed,
        shuffled=shuffles,
        sampler=EpochSampler(dataset, seed) if shuffles else InOrder(dataset),
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )


def seed_of(options) -> int:
    """Return the seed of ``train_ds.resumable``.

    Raises:
        ValueError: naming what is wrong with the options.
    """
    return Resumable.parse(options, 'train_ds.resumable').seed


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
