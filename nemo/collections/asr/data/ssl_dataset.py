# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``ssl_dataset.py``: bad audio is an error that names it, or is left out and counted.

``skip_bad_audio``: absent or false, an utterance that cannot be read or has non-finite samples ends the epoch; true, it is left out
of its batch, and silence takes the place of an empty one. Channels are mixed down, or ``channel_selector`` selects one.
"""

import io
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import soundfile
import torch
import webdataset
from lhotse import CutSet
from torch.nn.utils.rnn import pad_sequence

from nemo.collections.asr.data.audio_files import audio_entries, entries_within
from nemo.collections.asr.data.manifest_entries import ManifestEntries
from nemo.collections.asr.parts.utils.manifest_index import expanded, is_remote, local_entries, paths_in
from nemo.collections.asr.parts.utils.nonfinite_guard import NOT_FINITE, fault_of, on_this_rank, samples_are_valid
from nemo.collections.common.data.lhotse.nemo_adapters import CUT_OFF, LEAST_SHARE_OF_DURATION, NO_MEMBER, STANDS_FOR
from nemo.collections.common.parts.preprocessing import collections
from nemo.utils import logging
from nemo.utils.left_out import LEFT_OUT
from nemo_streaming_ssl import upstream

_up = upstream(globals())

SILENCE = 16000  # samples
SKIPPED = 'an utterance that is left out'  # stands for it until the batch is collated


class BadAudioError(ValueError):
    """Utterances that cannot be trained on: what they are counted under, and how many they are."""

    def __init__(self, message: str, reason: str = 'unreadable', count: int = 1):
        super().__init__(message)
        self.reason, self.count = reason, count


class NothingLeftError(BadAudioError):
    """A batch whose utterances are all left out."""


def leave_out(bad: BadAudioError, skip: bool | None) -> None:
    """Log and count utterances that are skipped; raise BadAudioError if they are not to be."""
    if not skip:
        message = f"bad audio{on_this_rank()}: {bad}; with train_ds.skip_bad_audio: true it would be skipped"
        raise BadAudioError(message) from bad
    others = f' and {bad.count - 1} others' if bad.count > 1 else ''
    logging.warning(f"Skipped bad audio{on_this_rank()}: {bad}{others}")
    LEFT_OUT.add(bad.reason, str(bad), bad.count)


@dataclass
class AudioNoiseBatch(_up.AudioNoiseBatch):
    """NeMo's batch, and what was left out of it."""

    skipped: int = 0  # utterances
    samples_are_checked: bool = False
    is_silence: bool = False  # which takes the place of a batch of which nothing is left, and adds no gradient
    sources: list[str] | None = None  # the tag of each utterance, where lhotse's input_cfg gives one


def silent_batch(skipped: int) -> AudioNoiseBatch:
    """Return what takes the place of a batch whose utterances are all left out."""
    signals = {name: torch.zeros(1, SILENCE) for name in ('audio', 'noise', 'noisy_audio')}
    lengths = {f'{name}_len': torch.tensor([SILENCE]) for name in signals}
    signs: dict[str, Any] = {'skipped': skipped, 'samples_are_checked': True, 'is_silence': True}
    return AudioNoiseBatch(['silence'], **signals, **lengths, **signs)


class _LeavesOut:
    """Leaves bad utterances out of batches, or refuses them."""

    skip_bad_audio = False

    def _collate_fn(self, batch) -> AudioNoiseBatch:
        kept = [item for item in batch if item is not SKIPPED]
        if not kept:
            return silent_batch(len(batch))
        collated = super()._collate_fn(kept)  # type: ignore[misc]
        collated.skipped, collated.samples_are_checked = len(batch) - len(kept), True
        return collated

    def _item_or_skipped(self, load, entry, file: str):
        """Return the item that a function loads, checked, or what stands for it; ``entry`` is of the manifest."""
        try:
            item = load()
            found, expected = item.audio.samples_read / self.featurizer.sample_rate, entry.duration or 0.0
            if found < LEAST_SHARE_OF_DURATION * expected and not self.trim:  # decoders and NeMo's padding hide it
                message = f"{file} lasts {found:.2f} s, in the manifest {expected:.2f}"
                if self.skip_bad_audio:
                    raise BadAudioError(message, 'shorter than in the manifest')
                logging.warning(f"Audio may be cut off: {message}")
            return item
        except Exception as error:  # soundfile, librosa and sox each have their own
            leave_out(_bad_file(file, error), self.skip_bad_audio)
            return SKIPPED


class AudioNoiseDataset(_LeavesOut, _up.AudioNoiseDataset):
    """NeMo's dataset of noisy audio; errors name the file, and entries are parsed on access."""

    def __init__(self, *args, **kwargs):
        with mock.patch.object(collections, 'ASRAudioText', ManifestEntries):  # NeMo's reads all entries
            super().__init__(*args, **kwargs)
        self.counter = LEFT_OUT  # spawned workers take it along

    def __getitem__(self, index):
        entry, load = self.manifest_processor.collection[index], super().__getitem__
        return self._item_or_skipped(lambda: load(index), entry, entry.audio_file)


class TarredAudioNoiseDataset(_LeavesOut, _up.TarredAudioNoiseDataset):
    """NeMo's tarred dataset of noisy audio; errors name tar and member, entries without one are counted."""

    tar = None

    def __init__(self, *, audio_tar_filepaths, manifest_filepath, min_duration=None, max_duration=None, **kwargs):
        kwargs |= {'min_duration': min_duration, 'max_duration': max_duration}
        super().__init__(audio_tar_filepaths=audio_tar_filepaths, manifest_filepath=manifest_filepath, **kwargs)
        self.counter = LEFT_OUT
        stages = self._dataset.pipeline
        names = [getattr(getattr(stage, 'f', None), '__name__', '') for stage in stages]
        stages[names.index('tarfile_samples')] = self._members
        if not self.manifest_processor.collection:
            raise ValueError(f"{manifest_filepath}: no entry lasts from {min_duration=} to {max_duration=} seconds")
        self._files_of_shards = defaultdict(set)
        for line in entries_within(local_entries(manifest_filepath), min_duration, max_duration):
            self._files_of_shards[line.entry.get('shard_id')].add(file_id(line.audio).partition('-sub')[0])
        # a file of an entry without the number of a tar file is expected in the first, if none has it
        tars = [tar for path in paths_in(audio_tar_filepaths) for tar in expanded(path)]
        unknown = self._files_of_shards.keys() - set(map(_shard_id, tars))
        strays = set().union(*map(self._files_of_shards.pop, unknown))
        if strays and not any(map(is_remote, tars)):
            self._files_of_shards[_shard_id(tars[0])] |= strays.difference(*map(files_in, tars))

    def _members(self, shards) -> Iterator[dict]:
        """Yield the members of tar files; count entries without one. A truncated file ends."""
        for shard in shards:
            self.tar, last, seen = shard['url'], None, set()
            errors: list[Exception] = []
            for member in webdataset.tarfile_to_samples(handler=errors.append)([shard]):  # None ends the file
                last = member['__key__']
                seen.add(file_id(last))
                yield member
            missing = self._files_of_shards[_shard_id(self.tar)] - seen
            why, reason = f"has no member {min(missing, default='')}", NO_MEMBER
            if errors:
                why, reason = f"is cut off after member {last}: {errors[0]}", CUT_OFF
            if errors or missing:
                leave_out(BadAudioError(f"{self.tar} {why}", reason, max(1, len(missing))), self.skip_bad_audio)

    def _build_sample(self, tup):
        _, name, offset_id = tup
        collection = self.manifest_processor.collection
        entry, load = collection[collection.mapping[file_id(name)][offset_id]], super()._build_sample
        return self._item_or_skipped(lambda: load(tup), entry, f'{self.tar}: {entry.audio_file}')


def files_in(tar: str) -> set[str]:
    """Return the files of a tar file, up to its end or where it is cut off."""
    files: set[str] = set()
    with suppress(tarfile.ReadError, EOFError), tarfile.open(tar) as members:
        files.update(file_id(member.name) for member in members)
    return files


def _shard_id(tar: str) -> int | None:
    number = re.search(r'_(\d+)[^/]*\.tar', tar)  # as lhotse finds it
    return number and int(number[1])


def file_id(name: str) -> str:
    """Return the name of a file as NeMo's tarred datasets compare it, without folder and ending."""
    return os.path.splitext(os.path.basename(name))[0]


class ChecksCuts:
    """Mixin for NeMo's lhotse datasets, before NeMo's class: counts or refuses bad audio, mixes down."""

    skip_bad_audio: bool | None = None  # None, as in NeMo: leaves out what cannot be read, not what is NaN or infinite
    skipped = 0  # utterances, of the latest batch

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._fetch = getattr(self.load_audio, 'ais_batch_loader', None) or iter  # of AIStore: in one request
        self.load_audio = self._load_checked_audio
        self.counter = LEFT_OUT  # spawned workers take it along

    def _load_checked_audio(self, cuts):
        """Return the audio, lengths and cuts that are readable and finite; NothingLeftError if none are."""
        self.skipped, audios, read, bad = 0, [], [], None
        for cut in self._fetch(cuts):
            try:
                audio = torch.from_numpy(cut.load_audio()).mean(dim=0)
                if not samples_are_valid(audio):
                    raise BadAudioError(NOT_FINITE, NOT_FINITE)
            except Exception as error:  # of lhotse and its decoders, or of a cut without audio
                bad = _bad_cut(cut, error)
                leave_out(bad, self.skip_bad_audio or (self.skip_bad_audio is None and bad.reason != NOT_FINITE))
                self.skipped += bad.count
            else:
                audios.append(audio)
                read.append(cut)
        if not read and not (self.skip_bad_audio or bad.reason in (CUT_OFF, NO_MEMBER)):  # NeMo has no batch of these
            leave_out(bad, skip=False)
        if not read:
            raise NothingLeftError(f"each utterance of a batch{on_this_rank()} is bad: {bad}")
        lengths = torch.tensor([len(audio) for audio in audios], dtype=torch.int32)
        return pad_sequence(audios, batch_first=True), lengths, CutSet.from_cuts(read)


class LhotseAudioNoiseDataset(ChecksCuts, _up.LhotseAudioNoiseDataset):
    """NeMo's lhotse dataset of noisy audio."""

    def __getitem__(self, cuts):
        """Return a batch; NeMo's method stacks noises, which fails if they differ in length from their cuts."""
        try:
            audios, lengths, read = self.load_audio(cuts)
        except NothingLeftError:
            return silent_batch(self.skipped)
        items = []
        for cut, audio, length in zip(read, audios, lengths):
            noise, noise_length = _up.sample_noise(self.noise_data, cut.sampling_rate, int(length))
            items.append(_up.AudioNoiseItem(cut.id, audio[: int(length)], length, noise, noise_length))
        batch = _up._audio_noise_collate_fn(items, self.batch_augmentor)
        if all(cut.has_custom('source') for cut in read):
            batch.sources = [cut.source for cut in read]
        batch.skipped, batch.samples_are_checked = self.skipped, True
        return batch


def _bad_cut(cut, error: Exception) -> BadAudioError:
    """Name a cut and the file it comes from, why it cannot be read, and what it stands for."""
    custom = getattr(cut, 'custom', None) or {}
    source = next(iter(getattr(getattr(cut, 'recording', None), 'sources', ())), None)
    origin = custom.get('tar_origin') or custom.get('shard_origin') or getattr(source, 'source', None)
    name = f'{cut.id} ({origin})' if isinstance(origin, (str, os.PathLike)) and str(origin) else cut.id
    if isinstance(error, BadAudioError):
        return BadAudioError(f'{name}: {error}', error.reason)
    if not cut.has_recording or getattr(source, 'type', None) == 'shar' or STANDS_FOR in custom:
        why = 'the file has no such member, or ends before it'
        return BadAudioError(f'{name}: {why}', *custom.get(STANDS_FOR, [CUT_OFF]))
    cause = str(error).partition('[extra info]')[0]  # lhotse adds the manifests of cut and recording
    return BadAudioError(' '.join(f'{name}: {type(error).__name__}: {cause}'.split()))


def load_noise_manifest(noise_manifest) -> list[dict]:
    """Read noise manifests and folders of shards into memory; ValueError names what is neither."""
    entries = []
    for name in map(os.path.expanduser, paths_in(noise_manifest)):
        if os.path.isdir(name):
            entries += _noise_of_shards(name)
        else:
            entries += _load_noise_manifest(name) if is_remote(name) else audio_entries([], name)
    return entries


def _noise_of_shards(folder: str) -> list[dict]:
    entries = []
    try:
        for cut in CutSet.from_shar(in_dir=folder):
            content = io.BytesIO(cut.recording.sources[0].source)  # NeMo prints an entry that it cannot read
            entries.append({'audio_filepath': f'{folder}: {cut.id}', 'duration': cut.duration, 'content': content})
    except (AssertionError, IndexError, KeyError, TypeError) as error:  # lhotse's, of a folder that is something else
        raise ValueError(f"noise_manifest {folder} is a folder, but not one of shards: {error}") from error
    return entries


class MonoSegment(_up.AudioSegment):
    """NeMo's audio segment, mixed down."""

    def __init__(self, *args, channel_selector=None, **kwargs):
        super().__init__(*args, channel_selector='average' if channel_selector is None else channel_selector, **kwargs)


def load_noise_audio(sample, sample_rate, max_audio_len=None, **kwargs):
    """Load noise as NeMo does, mixed down; noise that is bad is counted, and NeMo takes other noise."""
    read, longest = sample, np.inf if max_audio_len is None else max_audio_len / sample_rate
    if 'content' in sample:
        read = {**sample, 'audio_filepath': io.BytesIO(sample['content'].getvalue())}
        if longest < sample['duration']:  # NeMo would open it again for each part that it tries
            read |= {'offset': np.random.uniform(0, sample['duration'] - longest), 'duration': longest}
    try:
        noise, length = _load_noise_audio(read, sample_rate, max_audio_len, **kwargs)
        if fault := fault_of(noise[: int(length)]):
            raise BadAudioError(f"{sample['audio_filepath']}: {fault}")
    except Exception as error:
        bad = _bad_file(sample['audio_filepath'], error)
        LEFT_OUT.add('bad noise, replaced by other noise', str(bad))
        raise bad from error
    return noise, length


def pad_audio(audio, *args):
    """Return what NeMo's function does, which may repeat short audio, with ``samples_read``."""
    padded = _pad_audio(audio, *args)
    padded.samples_read = len(audio)
    return padded


def set_skip_bad_audio(dataset, skip) -> None:
    """Set whether a dataset, and all those it is made of, skips bad audio; raise ValueError if it cannot."""
    if not isinstance(skip, bool):
        raise ValueError(f"skip_bad_audio is {skip!r}; it must be true or false")
    able = [part for part in parts_of(dataset) if hasattr(part, 'skip_bad_audio')]
    for part in able:
        part.skip_bad_audio = skip
    if skip and not able:
        raise ValueError(f"skip_bad_audio is true, but {type(dataset).__name__} cannot skip bad audio")


def parts_of(dataset) -> Iterator:
    """Yield a dataset and all those it is made of."""
    if dataset is not None:
        yield dataset
        for part in getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]:
            yield from parts_of(part)


def _bad_file(file, error: Exception) -> BadAudioError:
    """Name a file and why it cannot be read; NeMo 2.5.3's second decoder hides the cause."""
    if isinstance(error, BadAudioError):
        return error
    if NOT_FINITE in str(error):  # NeMo's tarred dataset adds the entry
        return BadAudioError(f'{file}: {NOT_FINITE}', NOT_FINITE)
    if isinstance(file, str) and os.path.isfile(file):
        try:
            soundfile.info(file)
        except Exception as first:  # libsndfile's and the system's errors
            error = first
    return BadAudioError(' '.join(f'{file}: {type(error).__name__}: {error}'.split()))


_load_noise_audio, _load_noise_manifest, _pad_audio = _up.load_noise_audio, _up.load_noise_manifest, _up.pad_audio
# NeMo's functions find these in their own module's globals. The last one replaces a built-in: NeMo tests whether noise is
# silent with Python's sum over a NumPy array, 15 ms for 16 s of audio, and takes other noise until the sum is above 0.
_up.AudioNoiseBatch, _up.AudioNoiseDataset = AudioNoiseBatch, AudioNoiseDataset
_up.TarredAudioNoiseDataset, _up.load_noise_audio = TarredAudioNoiseDataset, load_noise_audio
_up.load_noise_manifest, _up.pad_audio, _up.AudioSegment = load_noise_manifest, pad_audio, MonoSegment
_up.sum = lambda values: values.any() if isinstance(values, np.ndarray) else sum(values)
