# SPDX-License-Identifier: Apache-2.0
"""Resumable batches of lhotse data: manifests, tarred manifests, Shar, mixtures, buckets. New here.

The shards of each source are divided among readers, the workers of all ranks. A reader reads segments, as many cuts as the
sampler's buffer holds, until nothing is left; all draws of a segment are seeded with its first position. So a place is where each
source was when the segment began, and how many of its batches are used: these are made again on resume, without loading audio.
"""

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from lhotse import CutSet
from lhotse.lazy import LazyInfiniteApproximateMultiplexer, LazyManifestIterator
from lhotse.serialization import deserialize_item
from lhotse.shar.readers.lazy import LazySharIterator
from omegaconf import open_dict
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nemo.collections.asr.data.resumable_loader import ResumableLoader, derive_seed, seed_generators
from nemo.collections.asr.parts.utils.config_keys import Resumable
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator, LazyNeMoTarredIterator
from nemo.utils import logging

REFUSED = {
    'concurrent_bucketing': 'a thread fills the buckets, so the order depends on its pace',
    'force_map_dataset': 'each rank then reads the cuts of all ranks',
    'multi_config': 'input_cfg mixes sources, too',
    'max_open_streams': 'a reader opens one shard of each source',
    'is_concat': 'lhotse reads the data; mix manifests with use_lhotse: true and input_cfg',
    'augmentor': 'lhotse reads the data; set use_lhotse: true and its augmentations',
}
READERS = LazySharIterator, LazyNeMoTarredIterator, LazyNeMoIterator, LazyManifestIterator


def resumable_config(config, options, ranks: int):
    """Return a data section for :class:`ResumableCutLoader`; ValueError names what cannot be resumed."""
    seed, config = Resumable.parse(options, 'train_ds.resumable').seed, copy.deepcopy(config)
    for key, reason in REFUSED.items():
        if config.get(key):
            raise ValueError(f"train_ds.{key} is {config[key]}; train_ds.resumable needs it unset: {reason}")
    with open_dict(config):
        if not config.get('use_lhotse', False):
            config.update(use_lhotse=True, force_finite=ranks == 1)
            if config.get('shuffle_n') and config.get('shuffle', False):
                config.shuffle_buffer_size = config.shuffle_n
        if config.get('force_finite', False) and ranks > 1:
            raise ValueError(
                f"train_ds.force_finite is true on {ranks} ranks; they have different numbers of batches, so it must be "
                "false: end epochs with trainer.limit_train_batches, and the run with trainer.max_steps"
            )
        config.update(force_iterable_dataset=True, concurrent_bucketing=False)
        for key in ('seed', 'shard_seed'):
            if not isinstance(config.get(key), int):
                config[key] = derive_seed(seed, key) % 2**31
    return config


@dataclass(eq=False)
class CutStream:
    """The cuts of one source that one of several readers reads, pass after pass; its position can be set.

    Where there are fewer shards than readers, readers share a shard: each takes every n-th cut. See :func:`_shards_of`.
    """

    open_shard: list[Callable]
    shuffled: bool
    seed: int
    readers: int
    finite: bool

    def __post_init__(self):
        self.parts = -(-self.readers // max(1, len(self.open_shard)))

    def go_to(self, reader: int, position: tuple[int, int, int, int]) -> None:
        """Set the reader and its position: pass, its first shard, shards read by the reader, cuts of the next."""
        self.reader, self.position = reader, tuple(position)
        self._cuts = self._read()

    def __iter__(self) -> 'CutStream':
        return self

    def __next__(self):
        return next(self._cuts)

    def __deepcopy__(self, memo) -> 'CutStream':
        return self  # copies of the sampler continue reading where the one before was

    def _read(self) -> Iterator:
        number, first, done, offset = self.position
        empty = not (done or offset)
        while True:
            order = list(itertools.product(range(len(self.open_shard)), range(self.parts)))
            if self.shuffled:
                random.Random(derive_seed(self.seed, number)).shuffle(order)
            for shard, part in order[first:][self.reader :: self.readers][done:]:
                window = part + offset * self.parts, None, self.parts  # of the shard's cuts
                for cut in self.open_shard[shard](number, window):
                    offset, empty = offset + 1, False
                    self.position = number, first, done, offset
                    yield cut
                done, offset = done + 1, 0
                self.position = number, first, done, 0
            if self.finite or (empty and not first):
                return
            number, first, done = number + 1, 0, 0


class ResumableCuts(IterableDataset):
    """Batches of a reader's cuts, each with its place: reader, the segment's positions, next batch in it.

    Streams take the place of the sources in NeMo's sampler.
    """

    def __init__(self, loader: DataLoader, config, seed: int, rank: int, ranks: int):
        self.dataset, self.sampler, self.seed, self.rank = loader.dataset.dataset, loader.dataset.sampler, seed, rank
        self.readers = ranks * max(1, loader.num_workers)
        buffer = 'bucket_buffer_size' if config.get('use_bucketing', False) else 'shuffle_buffer_size'
        self.segment = config.get(buffer) or 10000  # cuts
        streams: dict[int, CutStream] = {}

        def stream_of(source) -> CutStream:
            own = derive_seed(seed, 'shards', len(streams)), self.readers, config.get('force_finite', False)
            return streams.setdefault(id(source), CutStream(*_shards_of(source), *own))

        _replace_sources(self.sampler, stream_of)
        self.streams = list(streams.values())
        self.begin = [(0, 0)] * len(streams)  # pass and first shard of each source
        self.places: dict[int, tuple] = {}  # of the readers of this rank: the segment's positions, batches used
        self.first_reader = 0

    def __iter__(self) -> Iterator[tuple | None]:
        info = get_worker_info()
        reader, workers = (info.id, info.num_workers) if info else (0, 1)  # lhotse draws by the worker's number, too
        if reader < self.first_reader:
            yield None  # the batch comes from the next worker
        start = tuple((*begin, 0, 0) for begin in self.begin)
        positions, used = self.places.get(reader, (start, 0))
        for stream, position in zip(self.streams, positions):
            stream.go_to(self.rank * workers + reader, position)
        while True:
            size = self.segment if positions != start else -(-self.segment * (reader + 1) // workers)  # staggered
            number = None
            for number, cuts in enumerate(self._batches_of_segment(reader, positions, size)):
                if number >= used:
                    seed_generators(self.seed, 'data', self.rank, reader, positions, number)
                    yield (reader, (positions, number + 1)), self.dataset[cuts]
            if number is None:
                return
            positions, used = tuple(stream.position for stream in self.streams), 0

    def _batches_of_segment(self, reader: int, positions: tuple, size: int) -> Iterator[CutSet]:
        sampler = copy.deepcopy(self.sampler)
        place = self.seed, 'cuts', self.rank, reader, positions
        _seed_draws(sampler, *place)
        seed_generators(*place)
        sampler.cuts = tuple(itertools.islice(iter(cuts), size) for cuts in sampler.cuts)
        iter(sampler)
        for number in itertools.count():
            seed_generators(*place, number)
            cuts = next(sampler, None)
            if cuts is None:
                return
            yield cuts


class ResumableCutLoader(ResumableLoader):
    """Resumable batches of the data of NeMo's loader for a ``config`` of :func:`resumable_config`."""

    def __init__(self, loader: DataLoader, config, options, rank: int, ranks: int):
        data = ResumableCuts(loader, config, Resumable.parse(options, 'train_ds.resumable').seed, rank, ranks)
        kept = {name: getattr(loader, name) for name in ('num_workers', 'pin_memory', 'worker_init_fn')}
        collate = partial(_collate_batch, loader.collate_fn)
        super().__init__(data, seed=data.seed, batch_size=None, collate_fn=collate, **kept)
        self._pass_has_ended = False

    def state_dict(self) -> dict:
        """Return the places of the readers of all ranks; every rank calls it."""
        self._count_used()
        data = self.dataset
        own: tuple = data.rank, dict(data.places)
        places = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            places *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(places, own)
        return {
            'readers': data.readers,
            'workers': max(1, self.num_workers),
            'parts': [stream.parts for stream in data.streams],
            'begin': list(data.begin),
            'first_reader': data.first_reader,
            'places': dict(places),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a loader's state; with other numbers of ranks or workers, from the next shards."""
        data = self.dataset
        if (state['readers'], state['workers']) == (data.readers, max(1, self.num_workers)):
            data.begin, data.first_reader = state['begin'], state['first_reader']
            data.places = dict(state['places'].get(data.rank, {}))
            return
        data.begin = [_next_shard(state, index, stream.parts) for index, stream in enumerate(data.streams)]
        data.places, data.first_reader = {}, 0
        logging.warning(
            f"train_ds.resumable: the state is of {state['readers']} readers (ranks times workers), now there are {data.readers}. "
            f"They continue with shards that no reader had opened when its last segment began: up to {data.segment} utterances "
            "of each reader may come twice, and what was left of open shards is left out of this pass."
        )

    def _placed_batches(self) -> Iterator[tuple]:
        self._pass_has_ended = False
        yield from filter(None, DataLoader.__iter__(self))
        self._count_used()
        self._pass_has_ended = True
        self._begin_next_pass_when_used()

    def _use(self, place: tuple) -> None:
        reader, of_reader = place
        self.dataset.places[reader] = of_reader
        self.dataset.first_reader = (reader + 1) % max(1, self.num_workers)
        self._begin_next_pass_when_used()

    def _begin_next_pass_when_used(self) -> None:
        if self._pass_has_ended and not self._ahead:
            self.dataset.begin = [(number + 1, 0) for number, _ in self.dataset.begin]
            self.dataset.places, self.dataset.first_reader = {}, 0


def _collate_batch(collate: Callable, placed: tuple | None) -> tuple | None:
    return placed and (placed[0], collate(placed[1]))


def _next_shard(state: dict, index: int, parts: int) -> tuple[int, int]:
    """Return the pass of a source and its first shard that no reader of a state had opened."""
    opened = [state['begin'][index]]
    for rank, places in state['places'].items():
        for reader, (positions, _) in places.items():
            number, first, done, offset = positions[index]
            last = rank * state['workers'] + reader + (done - (offset == 0)) * state['readers']
            opened.append((number, first + max(0, last + 1)))
    number, shard = max(opened)
    return (number, shard) if parts == state['parts'][index] or shard == 0 else (number + 1, 0)


def _shards_of(source) -> tuple[list[Callable], bool]:
    """Return functions of a pass and a window that open a source's shards, and whether they are shuffled."""
    shards: list[dict] = [{}]  # what a copy of the source differs in
    if isinstance(source, LazySharIterator):
        shards = [{'shards': [files], 'cut_map_fns': [call]} for files, call in zip(source.shards, source.cut_map_fns)]
    elif isinstance(source, LazyNeMoTarredIterator):
        shards = [{'shard_id_to_manifest': {shard: source.shard_id_to_manifest[shard]}} for shard in source.shard_ids]
    elif isinstance(source, LazyNeMoIterator):
        shards = [{'source': file} for file in getattr(source.source, 'iterators', [source.source])]
    return [partial(_open_shard, source, shard) for shard in shards], bool(getattr(source, 'shuffle_shards', False))


def _open_shard(source, attributes: dict, number: int, window: tuple) -> Iterator:
    if isinstance(source, list):
        return itertools.islice(source, *window)
    if isinstance(source, LazyManifestIterator):
        return map(deserialize_item, itertools.islice(source.source, *window))
    one = copy.copy(source)
    vars(one).update(attributes, epoch=number, split_for_dataloading=False)
    if isinstance(source, LazyNeMoIterator):  # a cut opens the audio of its line
        lines = (line for line in one.source if not line.get('_skipme', False))
        one.source, window = itertools.islice(lines, *window), (None,)
    return itertools.islice(one, *window)


def _children(node) -> list[tuple]:
    """Return the keys and values in an object of lhotse or NeMo, or in a list; nothing of other objects."""
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if isinstance(node, CutStream) or type(node).__module__.split('.')[0] not in ('lhotse', 'nemo'):
        return []
    return list(getattr(node, '__dict__', {}).items())


def _replace_sources(node, stream_of: Callable) -> None:
    """Replace the readers of cuts below a sampler by streams; each reader has all mixed-in noise."""
    if isinstance(node, LazyInfiniteApproximateMultiplexer):
        raise ValueError(f"train_ds.max_open_streams is set; {REFUSED['max_open_streams']}")
    for key, value in _children(node):
        eager = isinstance(node, CutSet) and isinstance(value, (list, dict))
        if isinstance(value, READERS) or eager:
            stream = stream_of(list(value.values()) if isinstance(value, dict) else value)
            node.__setitem__(key, stream) if isinstance(node, list) else setattr(node, key, stream)
        elif isinstance(node, CutSet) and not type(value).__module__.startswith('lhotse'):
            raise ValueError(f"train_ds.resumable cannot divide {type(value).__name__} into shards; set it to null")
        elif key != 'mix_in_cuts':
            _replace_sources(value, stream_of)


def _seed_draws(node, *parts) -> None:
    """Seed whatever draws below a sampler with a function of the parts and of its place there."""
    for key, value in _children(node):
        if isinstance(value, random.Random):
            value.seed(derive_seed(*parts, key))
        elif key in ('seed', 'shard_seed'):
            setattr(node, key, derive_seed(*parts, key) % 2**31)
        else:
            _seed_draws(value, *parts, key)
