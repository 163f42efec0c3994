# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``nemo_adapters.py``: unreadable audio reaches the dataset, which handles it.

NeMo's readers drop damaged members of tar files and what follows the end of a truncated one. Here such an utterance is a cut
whose audio cannot be loaded. Headers of files are read, so segments and channels are right.
"""

import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import lhotse.lazy
import lhotse.shar
import lhotse.shar.readers.lazy as lazy_shar
import numpy as np
import soundfile as sound_files  # another name than NeMo's, which is replaced below
from lhotse import Recording
from lhotse.audio.backend import LibsndfileBackend
from lhotse.serialization import decode_json_line, open_best
from lhotse.shar.readers.tar import TarIterator
from lhotse.utils import compute_num_samples, fastcopy

from nemo.utils import logging
from nemo.utils.data_utils import is_datastore_path
from nemo.utils.left_out import LEFT_OUT
from nemo_streaming_ssl import upstream

_up = upstream(globals())

LEAST_SHARE_OF_DURATION = 0.5  # of the duration in the manifest; a shorter file is most likely cut off
UNKNOWN_DURATION = 100000  # seconds, what NeMo's transcribe() writes for every file
CUT_OFF = 'missing in a tar file that is cut off'
NO_MEMBER = 'without a member in their tar file'
STANDS_FOR = 'stands_for'  # key of a cut's custom values: why utterances have no audio, and how many it stands for


class JsonLines(_up.LazyJsonlIterator):
    """lhotse's reader of lines; blank lines count as nothing, and a line that is no JSON is named."""

    needed: tuple[str, ...] | None = None  # keys that each entry must have; None: these are no entries of NeMo's
    nullable: tuple[str, ...] = ()  # those of them that may be null

    def __iter__(self) -> Iterator[dict]:
        return (entry for _, entry in self.numbered())

    def numbered(self) -> Iterator[tuple[int, dict]]:
        """Yield the number of each line and its entry; raise ValueError naming a manifest that cannot be read."""
        try:
            with open_best(self.path, 'r') as lines:
                for number, line in enumerate(lines, 1):
                    if not line.isspace():
                        yield number, parsed(line, self.path, number, self.needed, self.nullable)
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"manifest {self.path} cannot be read: {error}") from error


class ManifestLines(JsonLines):
    """The reader of NeMo's manifests: an entry is an object, and its times are valid."""

    needed: tuple[str, ...] | None = ()


def parsed(line: bytes | str, path: str, number: int, needed: tuple[str, ...] | None = (), nullable=()) -> dict:
    """Return the entry of a line; ValueError names path and line if the line, a key or a time is invalid."""
    where = f"{path}, line {number}"
    try:
        entry = decode_json_line(line if isinstance(line, str) else line.decode())
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if needed is None:
        return entry
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no JSON object")
    if nullable and entry.get('_skipme'):  # NeMo's reader leaves it out
        return entry
    lacking = [key for key in needed if entry.get(key) is None and not (key in nullable and key in entry)]
    if lacking:
        raise ValueError(f"{where} has no {' and no '.join(lacking)}")
    for key, least in (('duration', -np.inf), ('offset', 0.0)):
        seconds = entry.get(key)
        if seconds is not None and not (isinstance(seconds, (int, float)) and least <= seconds < np.inf):
            raise ValueError(
                f"{where}: {key} is {seconds!r}; it must be a number of seconds{', 0 or more' * (least == 0)}"
            )
    return entry


def expand_sharded_filepaths(paths) -> list[str]:
    """Return the paths that NeMo's function does; each may begin with a tilde."""
    return [os.path.expanduser(path) for path in _expand(paths)]


class SharIterator(lazy_shar.LazySharIterator):
    """lhotse's reader of shards; the folder may begin with a tilde."""

    def __init__(self, fields=None, in_dir=None, **options):
        super().__init__(fields, in_dir and os.path.expanduser(in_dir), **options)


class LazyNeMoIterator(_up.LazyNeMoIterator):
    """NeMo's reader of manifests; a file whose header cannot be read makes a cut that cannot be loaded."""

    def __init__(self, path, *args, **kwargs):
        paths = [path] if isinstance(path, (str, Path)) else [*path]
        if isinstance(paths[-1], (int, float)):  # [path, weight], which NeMo takes for tarred manifests only
            paths.pop()
        paths = [*map(os.path.expanduser, paths)]
        super().__init__(paths if len(paths) > 1 else paths[0], *args, **kwargs)
        for source in getattr(self.source, 'iterators', [self.source]):
            source.needed, source.nullable = ('audio_filepath', 'duration'), ('duration',)  # null: as in the file

    def _create_cut(self, audio_path, offset, duration, sampling_rate=None):
        self._offset, self._duration = offset or 0.0, duration
        return super()._create_cut(audio_path, offset, duration, sampling_rate)

    def _create_recording(self, audio_path, duration, sampling_rate=None):
        with suppress(Exception):  # of soundfile, of lhotse; raised again where the audio is loaded
            if not sampling_rate or not is_datastore_path(audio_path):
                recording = Recording.from_file(audio_path)
                if holds(recording, self._offset, self._duration):
                    return recording
        end = self._offset + (1.0 if self._duration is None else self._duration)
        return super()._create_recording(audio_path, end, sampling_rate or 16000)


def holds(recording: Recording, offset: float, duration: float | None) -> bool:
    """Whether a recording has the segment of an entry, of which the end may be missing."""
    left, expected = recording.duration - offset, duration or 0.0
    return left > 0 and (expected >= UNKNOWN_DURATION or left >= LEAST_SHARE_OF_DURATION * expected)


class LazyNeMoTarredIterator(_up.LazyNeMoTarredIterator):
    """NeMo's reader of tarred manifests; every entry of a manifest is in its tar file, or is counted."""

    def _iter_sequential(self, tar_path, shard_manifest, *args):
        names, reason, why = set(), NO_MEMBER, f'{tar_path} has no such member'
        try:
            for data, audio, member in super()._iter_sequential(tar_path, shard_manifest, *args):
                names.add(member.name)
                yield data, audio, member
        except (tarfile.ReadError, EOFError) as error:
            reason, why = CUT_OFF, f'{tar_path} is cut off: {error}'
        except RuntimeError as error:  # NeMo's, for a member without an entry
            raise ValueError(f"{error}; skip_missing_manifest_entries: true ignores such members") from error
        missing = [name for name in shard_manifest if name not in names]
        if not missing or getattr(self, 'slice_length', None) is not None:
            return
        logging.warning(f"{len(missing)} members are missing, the first is {missing[0]}: {why}")
        entries = [entry for name in missing for entry in shard_manifest[name]]
        shard_manifest[missing[0]] = [{**entries[0], STANDS_FOR: [reason, len(entries)]}]
        yield shard_manifest[missing[0]], b'', tarfile.TarInfo(missing[0])  # the dataset counts it, or refuses it


def make_cut_with_subset_inmemory_recording(recording: Recording, offset: float = 0.0, duration: float | None = None):
    """Return NeMo's cut; with undecodable or too short audio, a cut that cannot be loaded."""
    offset = offset or 0.0
    if holds(recording, offset, duration):
        left = recording.duration - offset
        with suppress(Exception):  # of any decoder
            return _make_cut(recording, offset=offset, duration=left if duration is None else min(duration, left))
    longer = offset + max(duration or 0.0, 1.0) + recording.duration
    samples = compute_num_samples(longer, recording.sampling_rate)
    claim = fastcopy(recording, num_samples=samples, duration=longer)
    return claim.to_cut().truncate(offset=offset, preserve_id=True)


class _NonFiniteBackend(LibsndfileBackend):
    """Keeps samples that are NaN or infinite, which 16-bit files turn into clicks."""

    def save_audio(self, dest, src, sampling_rate, format=None, **kwargs):
        if np.isfinite(src).all():
            super().save_audio(dest, src, sampling_rate, format=format, **kwargs)
        else:
            sound_files.write(dest, src.T, sampling_rate, format='WAV', subtype='FLOAT')


def _header(file: BytesIO):
    """Return what ``soundfile.info`` does, or a header of one sample where there is none."""
    with suppress(Exception):  # of libsndfile
        return sound_files.info(file)
    return SimpleNamespace(samplerate=16000, channels=1, frames=1, duration=1 / 16000)


class WholeTarIterator(TarIterator):
    """lhotse's reader of a shard's recordings, one per cut; the first that is missing has no data."""

    def __iter__(self):
        read, reason = 0, 'it ends before its cuts'
        try:
            for item in super().__iter__():
                read += 1
                yield item
        except Exception as error:  # of tarfile, and of lhotse where a pair of members is incomplete
            reason = str(error)
        logging.warning(f"{self.source} is cut off after {read} recordings: {reason}")
        number = Path(self.source).name.partition('.')[2].removesuffix('.tar')
        manifests = Path(self.source).parent.glob(f'cuts.{number}.jsonl*')  # none, if the shard is elsewhere
        cuts = sum(sum(1 for _ in lazy_shar.LazyJsonlIterator(manifest)) for manifest in manifests)
        LEFT_OUT.add(CUT_OFF, f'{self.source}: {reason}', cuts - read - 1)
        yield None, None  # reached only if there is one more cut


# NeMo's and lhotse's functions look these up in their own modules.
_make_cut = _up.make_cut_with_subset_inmemory_recording
_make_cut, _expand = getattr(_make_cut, '__wrapped__', _make_cut), _up.expand_sharded_filepaths
make_cut_with_subset_inmemory_recording.__wrapped__ = _make_cut
_up.LazyNeMoIterator, _up.LazyNeMoTarredIterator = LazyNeMoIterator, LazyNeMoTarredIterator
_up.make_cut_with_subset_inmemory_recording = make_cut_with_subset_inmemory_recording
_up.expand_sharded_filepaths = expand_sharded_filepaths
_up.LibsndfileBackend, _up.soundfile = _NonFiniteBackend, SimpleNamespace(info=_header)
_up.LazyJsonlIterator, lhotse.lazy.LazyJsonlIterator = ManifestLines, JsonLines
lazy_shar.TarIterator, lhotse.shar.LazySharIterator = WholeTarIterator, SharIterator
