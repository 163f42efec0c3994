# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``ssl_dataset.py``: bad audio is named, or skipped and counted; no Python loop over noise samples.

``train_ds.skip_bad_audio``: absent or false, an utterance that cannot be read, or has samples that are NaN or
infinite, ends the epoch with an error that names its file, from a data loader's worker as well; true, it is left out
of its batch, logged, and counted in the batch's ``skipped``. A batch of which nothing is left is an error.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
from lhotse import CutSet

from nemo.collections.asr.data.manifest_entries import entries_read_when_asked_for
from nemo.collections.asr.parts.utils.nonfinite_guard import on_this_rank, samples_are_valid
from nemo.utils import logging
from nemo_streaming_ssl import upstream

_up = upstream(globals())

LEAST_SHARE_OF_DURATION = 0.5  # of what the manifest says; a file with less is most likely cut off


class BadAudioError(ValueError):
    """An utterance that cannot be trained on; says which file, and why."""


@dataclass
class AudioNoiseBatch(_up.AudioNoiseBatch):
    """NeMo's batch, and how many utterances were left out of it."""

    skipped: int = 0


class SkippedItem:
    """Stands in a batch for an utterance that is skipped, until the batch is collated."""


class _CollatesWhatIsSound:
    """Leaves skipped utterances out of a batch."""

    skip_bad_audio = False

    def _collate_fn(self, batch) -> AudioNoiseBatch:
        kept = [item for item in batch if not isinstance(item, SkippedItem)]
        if not kept:
            raise BadAudioError(
                f"each of the {len(batch)} utterances of a batch{on_this_rank()} is bad; the log names them"
            )
        collated = super()._collate_fn(kept)
        collated.skipped = len(batch) - len(kept)
        return collated

    def _sound_or_skipped(self, load, entry):
        """Return the item that a function loads, checked, or what stands for it; ``entry`` is of the manifest."""
        try:
            item = load()
            _check_samples(item.audio, entry.audio_file)
            self._check_duration(item, entry)
            return item
        except Exception as error:  # soundfile, librosa and sox each have their own
            message = str(error) if isinstance(error, BadAudioError) else _reason(entry.audio_file, error)
            if not self.skip_bad_audio:
                raise _bad_audio(message) from error
        logging.warning(f"Skipped bad audio{on_this_rank()}: {message}")
        return SkippedItem()

    def _check_duration(self, item, entry) -> None:
        """Find files that were cut off, which decoders read without a word; NeMo pads them."""
        found = len(item.audio) / self.featurizer.sample_rate
        expected = 0.0 if self.trim or entry.duration is None else entry.duration
        if found >= LEAST_SHARE_OF_DURATION * expected:
            return
        message = f"{entry.audio_file} lasts {found:.2f} s, the manifest says {expected:.2f}"
        if self.skip_bad_audio:
            raise BadAudioError(message)
        logging.warning(f"Audio may be cut off: {message}")


class AudioNoiseDataset(_CollatesWhatIsSound, _up.AudioNoiseDataset):
    """NeMo's dataset of noisy audio, with errors that name the file, and entries that are parsed when asked for."""

    def __init__(self, *args, **kwargs):
        with entries_read_when_asked_for():
            super().__init__(*args, **kwargs)

    def __getitem__(self, index):
        """Return an utterance with its noise, or what stands for a skipped one.

        Raises:
            BadAudioError: if it is bad and not to be skipped.
        """
        return self._sound_or_skipped(
            lambda: super(AudioNoiseDataset, self).__getitem__(index), self.manifest_processor.collection[index]
        )


class TarredAudioNoiseDataset(_CollatesWhatIsSound, _up.TarredAudioNoiseDataset):
    """NeMo's tarred dataset of noisy audio, with errors that name the file."""

    def _build_sample(self, tup):
        _, audio_filename, offset_id = tup
        file_id, _ = os.path.splitext(os.path.basename(audio_filename))
        collection = self.manifest_processor.collection
        entry = collection[collection.mapping[file_id][offset_id]]
        return self._sound_or_skipped(lambda: super(TarredAudioNoiseDataset, self)._build_sample(tup), entry)


class LhotseAudioNoiseDataset(_up.LhotseAudioNoiseDataset):
    """NeMo's lhotse dataset of noisy audio.

    As in NeMo, lhotse skips and logs what it cannot read, unless ``skip_bad_audio`` is set to false.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.load_audio = SoundAudioSamples(self.load_audio)

    @property
    def skip_bad_audio(self) -> bool | None:
        """Whether bad audio is left out; None: what cannot be read, and not what is NaN or infinite."""
        return self.load_audio.skip_bad_audio

    @skip_bad_audio.setter
    def skip_bad_audio(self, skip: bool | None) -> None:
        self.load_audio.skip_bad_audio = skip

    def __getitem__(self, cuts):
        """Return a batch; its ``skipped`` counts what could not be read, too.

        NeMo's stacks noises that are as long as their cuts, which fails where these differ.
        """
        audios, lengths, sound = self.load_audio(cuts)
        items = []
        for cut, audio, length in zip(sound, audios, lengths):
            noise, noise_length = _up.sample_noise(self.noise_data, cut.sampling_rate, int(length))
            items.append(
                _up.AudioNoiseItem(
                    sample_id=cut.id,
                    audio=audio[: int(length)],
                    audio_len=length,
                    noise=noise,
                    noise_len=noise_length,
                )
            )
        batch = _up._audio_noise_collate_fn(items, self.batch_augmentor)
        batch.skipped = len(cuts) - len(items)
        return batch


class SoundAudioSamples:
    """Wraps lhotse's loading of a batch, which skips what it cannot read; bad cuts are refused or left out."""

    skip_bad_audio: bool | None = None

    def __init__(self, load_audio):
        self.load_audio = load_audio

    def __call__(self, cuts):
        """Return the audio, lengths and cuts that can be read and are finite."""
        audios, lengths, read = self._read(cuts)
        if samples_are_valid(audios):
            return audios, lengths, read
        sound = torch.tensor([samples_are_valid(audio) for audio in audios])
        bad = [cut for cut, is_sound in zip(read, sound.tolist()) if not is_sound]
        message = f"{', '.join(map(_name_of_cut, bad))}: samples that are NaN or infinite"
        if not self.skip_bad_audio or not sound.any():
            raise _bad_audio(message)
        logging.warning(f"Skipped bad audio{on_this_rank()}: {message}")
        is_sound = dict(zip((cut.id for cut in read), sound.tolist()))
        return audios[sound], lengths[sound], read.filter(lambda cut: is_sound[cut.id]).to_eager()

    def _read(self, cuts):
        """Return what lhotse does; where bad audio is not to be skipped, the first cut that it left out is an error."""
        found = None
        try:
            found = self.load_audio(cuts)
        except Exception as error:  # lhotse's, for a batch of which nothing can be read
            reason = error
        read = set() if found is None else {cut.id for cut in found[2]}
        missing = [cut for cut in cuts if cut.id not in read]
        if not missing or (found is not None and self.skip_bad_audio is not False):
            return found
        try:
            missing[0].load_audio()
        except Exception as error:  # the reason, which lhotse has logged only
            reason = error
        raise _bad_audio(' '.join(f'{_name_of_cut(missing[0])}: {type(reason).__name__}: {reason}'.split()))


def _name_of_cut(cut) -> str:
    """Return the id of a cut, with its file if it has one; what comes out of shards has none."""
    source = cut.recording.sources[0].source if cut.has_recording and cut.recording.sources else None
    return f'{cut.id} ({source})' if isinstance(source, str) else cut.id


def _bad_audio(message: str) -> BadAudioError:
    """Return the error about bad audio that is not to be skipped, or that leaves nothing of a batch."""
    return BadAudioError(
        f"bad audio{on_this_rank()}: {message}; with train_ds.skip_bad_audio: true it would be skipped, where it is not a "
        "whole batch"
    )


def load_noise_manifest(noise_manifest) -> list[dict]:
    """Read noise manifests as NeMo does; a folder of shards (``prepare_shards.py``) counts as one.

    Shards can only be read in order, and noise is drawn at random: so they are held in memory, compressed as they are,
    once for all workers, which are forks.

    Raises:
        ValueError: if there is a folder without shards.
    """
    names = noise_manifest.split(',') if isinstance(noise_manifest, str) else noise_manifest or []
    entries = []
    for name in names:
        entries += _noise_of_shards(name) if os.path.isdir(name) else _load_noise_manifest(name)
    return entries


class _Content(bytes):
    """A file's content, which NeMo prints with the entry where it cannot read it."""

    def __repr__(self) -> str:
        return f'<{len(self)} bytes>'


def _noise_of_shards(folder: str) -> list[dict]:
    try:
        cuts = CutSet.from_shar(in_dir=folder)
        return [
            {
                'audio_filepath': f'{folder}: {cut.id}',
                'duration': cut.duration,
                'content': _Content(cut.recording.sources[0].source),
            }
            for cut in cuts
        ]
    except (AssertionError, IndexError, KeyError, TypeError) as error:  # lhotse's, of a folder that is something else
        raise ValueError(f"noise_manifest {folder} is a folder, but not one of shards: {error}") from error


def load_noise_audio(sample, sample_rate, max_audio_len=None, **kwargs):
    """Load noise as NeMo does; noise that is not sound is an error, after which NeMo takes other noise."""
    read = sample
    if 'content' in sample:
        read = {**sample, 'audio_filepath': io.BytesIO(sample['content'])}
        longest = None if max_audio_len is None else max_audio_len / sample_rate
        if (
            longest is not None and longest < sample['duration']
        ):  # NeMo would open it again for each part that it tries
            read |= {'offset': np.random.uniform(0, sample['duration'] - longest), 'duration': longest}
    noise, length = _load_noise_audio(read, sample_rate, max_audio_len, **kwargs)
    _check_samples(noise, sample['audio_filepath'])
    return noise, length


def set_skip_bad_audio(dataset, skip: bool) -> None:
    """Tell a dataset, and all those it is made of, whether to skip bad audio.

    Raises:
        ValueError: if ``skip`` is not true or false, or true for a dataset that cannot skip.
    """
    if not isinstance(skip, bool):
        raise ValueError(f"skip_bad_audio is {skip!r}; it must be true or false")
    able = [part for part in _parts(dataset) if hasattr(part, 'skip_bad_audio')]
    for part in able:
        part.skip_bad_audio = skip
    if skip and not able:
        raise ValueError(f"skip_bad_audio is true, but {type(dataset).__name__} cannot skip bad audio")


def _parts(dataset) -> Iterator:
    if dataset is None:
        return
    yield dataset
    for part in getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]:
        yield from _parts(part)


def _check_samples(samples: torch.Tensor, file: str | None) -> None:
    if not samples_are_valid(samples):
        raise BadAudioError(f"{file}: samples that are NaN or infinite")


def _reason(file: str | None, error: Exception) -> str:
    """Name a file and say why it cannot be read; NeMo 2.5.3 tries a second decoder, whose error says less."""
    if isinstance(file, str) and os.path.isfile(file):
        try:
            soundfile.info(file)
        except Exception as first:  # libsndfile's and the system's errors
            error = first
    return ' '.join(f'{file}: {type(error).__name__}: {error}'.split())


def _sum(values):
    return values.any() if isinstance(values, np.ndarray) else sum(values)


_load_noise_audio, _load_noise_manifest = _up.load_noise_audio, _up.load_noise_manifest
# NeMo's functions find these in their own module's globals. The last one takes a built-in's place: NeMo asks whether
# noise is silent with Python's sum over a NumPy array, 15 ms for 16 s of audio, and takes other noise until the sum is
# above 0, which is as often below: two readings for each utterance, and none of the noise whose mean is below 0.
_up.AudioNoiseBatch, _up.AudioNoiseDataset = AudioNoiseBatch, AudioNoiseDataset
_up.TarredAudioNoiseDataset, _up.load_noise_audio = TarredAudioNoiseDataset, load_noise_audio
_up.load_noise_manifest = load_noise_manifest
_up.sum = _sum
