# SPDX-License-Identifier: Apache-2.0
"""Read audio files as mono samples; errors name the file and the fault. New in this project."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import librosa
import numpy as np
import soundfile

from nemo.collections.asr.parts.utils.manifest_index import Line, read_entries
from nemo.collections.common.parts.preprocessing.manifest import get_full_path
from nemo.utils.left_out import LEFT_OUT, OUTSIDE_LIMITS

UNKNOWN_LENGTH = 0x7FFFF000  # bytes: headers of piped wav files claim this much or more


def read_audio(path: Path, rate: int, offset: float = 0.0, duration: float | None = None) -> np.ndarray:
    """Read a file, or ``duration`` s from ``offset`` on, at ``rate``: mono float32 [N], full scale 1.

    ValueError names the file, if it is missing, empty, truncated, no audio, or has non-finite samples.
    """
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f'{path}: {"the file is empty" if path.is_file() else "there is no such file"}')
    try:
        with soundfile.SoundFile(str(path)) as audio:
            _check_complete(audio)
            audio.seek(min(int(offset * audio.samplerate), audio.frames))
            left = audio.frames - audio.tell()
            wanted = left if duration is None else min(left, int(duration * audio.samplerate))
            samples, own_rate = audio.read(wanted, dtype='float32', always_2d=True), audio.samplerate
    except (soundfile.LibsndfileError, ValueError) as error:
        raise ValueError(f'{path}: cannot be read as audio: {error}') from None
    if len(samples) < wanted:
        raise ValueError(f'{path}: the file is truncated: {len(samples)} of {wanted} samples are there')
    if len(samples) == 0:
        raise ValueError(f'{path}: there are no samples in it')
    if not np.isfinite(samples).all():
        raise ValueError(f'{path}: it holds samples that are not finite')
    mono = samples.mean(axis=1)
    return mono if own_rate == rate else librosa.resample(mono, orig_sr=own_rate, target_sr=rate).astype(np.float32)


def _check_complete(audio: soundfile.SoundFile) -> None:
    """Raise ValueError if the file has less audio than its header declares; libsndfile only logs it."""
    for claimed, there in re.findall(r'^\s*data\s*:\s*(\d+)\s*\(should be (\d+)\)', audio.extra_info, re.MULTILINE):
        if int(there) < int(claimed) < UNKNOWN_LENGTH:
            raise ValueError(f'the file is truncated: {there} of {claimed} bytes of samples are there')


def audio_entries(files: list[Path], manifest: Path | str | None, must_exist: bool = False) -> list[dict]:
    """Return entries, with absolute paths, of audio files or of manifests; ValueError names a bad line."""
    if manifest is None:
        return [{'audio_filepath': str(path)} for path in files]
    entries = []
    for line in read_entries(manifest):
        path = get_full_path(line.audio, manifest_file=line.manifest)
        entries.append({**line.entry, 'audio_filepath': path})
        if must_exist and not (isinstance(path, str) and Path(path).is_file()):
            raise ValueError(f'{line.place}: there is no audio file {line.audio}')
    return entries


def entries_within(lines: Iterable[Line], shortest: float | None, longest: float | None) -> Iterator[Line]:
    """Yield the entries that have no duration or one within the limits, in seconds; count the others."""
    others, first = 0, ''
    for line in lines:
        seconds = line.entry.get('duration')
        if seconds is None or (shortest or 0.0) <= seconds <= (np.inf if longest is None else longest):
            yield line
        else:
            others, first = others + 1, first or f'{line.place}: {seconds} s'
    LEFT_OUT.add(OUTSIDE_LIMITS, first, others)


def read_entry(entry: dict, rate: int) -> np.ndarray:
    """Return the samples of an entry, float32 [N]; errors are those of :func:`read_audio`."""
    return read_audio(Path(entry['audio_filepath']), rate, entry.get('offset') or 0.0, entry.get('duration'))
