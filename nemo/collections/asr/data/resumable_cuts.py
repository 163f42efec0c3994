# SPDX-License-Identifier: Apache-2.0
"""Resumable batches of data that lhotse reads: manifests, tarred manifests, lhotse Shar, mixed and bucketed. New here.

lhotse's samplers can save a state, but not with NeMo's constraints on batches, and not for another number of ranks. So a
batch is a function of (seed, epoch, number) here: each epoch has a sampler of its own, made by NeMo's function from the
config, whose every draw is seeded, and which lives in the training process. To resume is to ask a new one for as many
batches and to throw them away: their audio is not decoded, but of shards it is read.

The samplers make batches for all ranks together and hand them out in turn. So the batches of an epoch do not depend on who
takes them, and on another number of ranks the next one is still the next.
"""

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from omegaconf import OmegaConf, open_dict
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from nemo.collections.asr.data.resumable_loader import ResumableLoader, derive_seed, seed_generators, seed_of
from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig, get_lhotse_dataloader_from_config

SEEDS = ('seed', 'shard_seed')
# What makes the order depend on more than the seed, and why.
DISORDERLY = {
    'concurrent_bucketing': "a thread fills the buckets, so the order depends on its pace",
    'force_iterable_dataset': "each worker then reads an order of its own, which another number of workers changes",
    'multi_config': "its samplers divide the batches each by itself; input_cfg mixes data, too",
}


def reads_cuts(config) -> bool:
    """Whether the data of a section can be resumed through lhotse: it asks for lhotse, or for tarred manifests."""
    return bool(config is not None and (config.get('use_lhotse', False) or config.get('is_tarred', False)))


def repeatable_config(config, options):
    """Return a data section whose batches are a function of a seed; seeds that it has itself stay.

    Tarred manifests are read through lhotse, an epoch at a time: NeMo's own reader shuffles by clock and process.

    Args:
        config: the section, which is left as it is.
        options: ``train_ds.resumable``.

    Raises:
        ValueError: naming the setting that stands against it, the reason, and what to set.
    """
    seed_of(options)
    config = copy.deepcopy(config if OmegaConf.is_config(config) else OmegaConf.create(config))
    for key, reason in DISORDERLY.items():
        if config.get(key, False):
            raise ValueError(f"train_ds.{key} is true; train_ds.resumable needs it false: {reason}")
    for key in SEEDS:
        if isinstance(config.get(key), str):
            raise ValueError(
                f"train_ds.{key} is {config[key]!r}, another one in each process; train_ds.resumable needs a number"
            )
    with open_dict(config):
        if not config.get('use_lhotse', False):
            _read_tarred_through_lhotse(config)
        config.force_map_dataset = True
        if 'concurrent_bucketing' in LhotseDataLoadingConfig.__dataclass_fields__:  # NeMo 3.0.0's default is true
            config.concurrent_bucketing = False
    return config


def _read_tarred_through_lhotse(config) -> None:
    for key in ('is_concat', 'augmentor'):
        if config.get(key):
            raise ValueError(
                f"train_ds.{key} is set; train_ds.resumable reads tarred manifests through lhotse, which has "
                f"{'input_cfg' if key == 'is_concat' else 'augmentations of its own'} instead: set use_lhotse: true"
            )
    shuffle_n = config.pop('shuffle_n', None)
    if shuffle_n and config.get('shuffle', False):
        config.shuffle_buffer_size = shuffle_n
    config.pop('is_tarred')
    config.pop('tarred_shard_strategy', None)
    config.use_lhotse, config.force_finite = True, True


def make_resumable_cuts(loader: DataLoader, config, options, rank: int, ranks: int) -> 'ResumableCutLoader':
    """Return a loader of the same data that is resumable.

    Args:
        loader: what NeMo made of ``config``.
        config: of :func:`repeatable_config`.
        options: ``train_ds.resumable``.
        rank: of this process.
        ranks: how many there are.

    Raises:
        ValueError: if NeMo's loader reads in its workers after all.
    """
    seed = seed_of(options)
    if loader.sampler is None or isinstance(loader.dataset, torch.utils.data.IterableDataset):
        raise ValueError("train_ds.resumable: the data are read in the loader's workers; set force_map_dataset: true")

    def make_sampler(epoch: int, ranks: int):
        own = {key: derive_seed(seed, key, config.get(key), epoch) % 2**31 for key in SEEDS}
        of_epoch = copy.deepcopy(config)
        with open_dict(of_epoch):
            of_epoch.update(own)
        return get_lhotse_dataloader_from_config(of_epoch, 0, ranks, loader.dataset).sampler

    return ResumableCutLoader(
        RepeatableCuts(loader.dataset, seed, rank),
        seed=seed,
        sampler=CutBatches(make_sampler, seed, rank, ranks),
        batch_size=None,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )


class CutBatches(DistributedSampler):
    """The batches of cuts of a rank, each with its epoch and number.

    It is a ``DistributedSampler``, for it divides the data by itself, and Lightning leaves such ones alone.

    Args:
        make_sampler: takes an epoch and a number of ranks; returns lhotse's sampler of its first rank.
        seed: of all that a sampler draws when it is asked for a batch.
        rank: of this process.
        ranks: how many there are.
    """

    def __init__(self, make_sampler: Callable, seed: int, rank: int, ranks: int):
        super().__init__([], num_replicas=ranks, rank=rank)
        self.make_sampler, self.seed = make_sampler, seed
        self.used = 0
        self.began_with = ranks
        """How many ranks the batches of the epoch were made for: buckets are chosen for so many at once."""

    def __len__(self) -> int:
        raise TypeError("how many batches lhotse will make is not known")

    def __iter__(self) -> Iterator[tuple]:
        epoch, ranks = self.epoch, self.began_with
        with own_generators(self.seed, 'epoch', epoch):
            sampler = self.make_sampler(epoch, ranks)
            iter(sampler)
        numbers = itertools.count()
        if ranks != self.num_replicas:
            self._share(sampler, 0, 1)
            self._pass(sampler, numbers, epoch, self.used)
            self._share(sampler, self.rank, self.num_replicas)
        else:
            self._share(sampler, self.rank, ranks)
            self._pass(sampler, numbers, epoch, self.used // ranks)
        for number in numbers:
            try:
                yield (epoch, number), self._next(sampler, epoch, number)
            except StopIteration:
                return

    def _pass(self, sampler, numbers: Iterator[int], epoch: int, batches: int) -> None:
        for number in itertools.islice(numbers, batches):
            self._next(sampler, epoch, number)

    def _next(self, sampler, epoch: int, number: int):
        with own_generators(self.seed, 'cuts', epoch, number):
            return next(sampler)

    @staticmethod
    def _share(sampler, rank: int, ranks: int) -> None:
        """Say whom a sampler that has begun hands its batches to."""
        sampler.rank, sampler.world_size = rank, ranks


class RepeatableCuts(Dataset):
    """A dataset of which each batch is loaded with generators seeded for it.

    Args:
        dataset: makes a batch of cuts.
        seed: of the draws.
        rank: of this process.
    """

    def __init__(self, dataset, seed: int, rank: int):
        self.dataset, self.seed, self.rank = dataset, seed, rank

    def __getitem__(self, numbered):
        place, cuts = numbered
        seed_generators(self.seed, 'data', self.rank, *place)
        return self.dataset[cuts]


class ResumableCutLoader(ResumableLoader):
    """Resumable batches of cuts; made by :func:`make_resumable_cuts`."""

    unit = 'batches'
    _ended = False

    def state_dict(self) -> dict:
        """Return where the loader is, and how many ranks the batches of the epoch are made for."""
        state = super().state_dict()
        same = state['epoch'] == self._epoch()
        return {**state, 'made_for': self.sampler.began_with if same else self.ranks}

    def load_state_dict(self, state: dict) -> None:
        """Begin the next epoch where a loader with this state was, on as many ranks or others."""
        super().load_state_dict(state)
        self.sampler.began_with = state['made_for']

    def _begin_epoch(self, epoch, used):
        self._ended = False
        self.sampler.used = used
        if not used:
            self.sampler.began_with = self.ranks

    def _is_over(self, batches):
        return self._ended and batches >= self._given

    def _after_the_last(self):
        self._ended = True


@contextmanager
def own_generators(*parts) -> Iterator[None]:
    """Let the block draw from generators seeded with a function of the parts, and put the process's own back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_generators(*parts)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
