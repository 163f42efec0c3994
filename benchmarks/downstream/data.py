# SPDX-License-Identifier: Apache-2.0
"""The data of the comparison: utterances of one speaker joined to long ones, and the subsets to fine-tune on.

Joining is a function of the manifest alone: a speaker's utterances follow each other in the order of the manifest,
without a pause between, until they are as long as asked for; what is left over belongs to the speaker's last joined
utterance. So all speech is used once, and nothing is cut.
"""

import hashlib
import json
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import numpy as np
import phones
import soundfile
from tqdm import tqdm

from nemo.collections.asr.parts.preprocessing.segment import AudioSegment
from nemo.utils.atomic_files import replacing

RATE = 16000
HELD_OUT = 40  # utterances that fine-tuning is validated on
ROLES = ('pretraining', 'validation', 'tuning', 'test')


def read_manifest(path: Path) -> list[dict]:
    """Return the entries of a manifest, with absolute paths.

    Raises:
        ValueError: naming the manifest, if it cannot be read, or the first entry without a speaker or a duration.
    """
    try:
        entries = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest {path} cannot be read: {error}") from error
    for number, entry in enumerate(entries, 1):
        missing = [key for key in ('audio_filepath', 'duration', 'speaker') if key not in entry]
        if missing:
            raise ValueError(f"manifest {path}, entry {number} has no {missing[0]}")
    return [{**entry, 'audio_filepath': str(path.resolve().parent / entry['audio_filepath'])} for entry in entries]


def write_manifest(path: Path, entries: Iterable[dict]) -> None:
    """Write a manifest, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(''.join(json.dumps(entry) + '\n' for entry in entries), encoding='utf-8')


def by_speaker(entries: Iterable[dict]) -> dict[str, list[dict]]:
    """Return the entries of each speaker, speakers and entries in the order given."""
    found = {}
    for entry in entries:
        found.setdefault(entry['speaker'], []).append(entry)
    return found


def grouped(entries: list[dict], seconds: float) -> list[list[dict]]:
    """Return which utterances are joined: of one speaker, and as long as asked for where the speaker has said enough.

    Args:
        entries: of a manifest.
        seconds: how long.
    """
    groups = []
    for said in by_speaker(entries).values():
        own, length = [[]], 0.0
        for entry in said:
            if length >= seconds:
                own.append([])
                length = 0.0
            own[-1].append(entry)
            length += entry['duration']
        if length < seconds and len(own) > 1:
            rest = own.pop()
            own[-1] += rest
        groups += own
    return groups


def name_of(group: list[dict]) -> str:
    """Return the name of a joined utterance: its speaker, and its first file."""
    return f"{group[0]['speaker']}_{Path(group[0]['audio_filepath']).stem}"


def joined(group: list[dict], folder: Path) -> dict:
    """Write the audio of a group as one file, and return its entry; ``text`` has a character for each phone.

    Raises:
        ValueError: naming the audio that cannot be read, or the unknown phone.
    """
    name = name_of(group)
    samples = np.concatenate([read_audio(entry) for entry in group])
    with replacing(folder / f'{name}.flac') as partial:
        soundfile.write(partial, samples, RATE, format='FLAC', subtype='PCM_16')
    text = ''.join(phones.spell(entry.get('phones', ''), entry['audio_filepath']) for entry in group)
    return {
        'audio_filepath': f'{folder.name}/{name}.flac',
        'duration': len(samples) / RATE,
        'text': text,
        'speaker': group[0]['speaker'],
        'utterance': name,
    }


def read_audio(entry: dict) -> np.ndarray:
    """Return the samples [N] of an entry.

    Raises:
        ValueError: naming the file, if it cannot be read as mono.
    """
    path, offset = entry['audio_filepath'], entry.get('offset') or 0.0
    try:
        samples = AudioSegment.from_file(path, target_sr=RATE, offset=offset, duration=entry['duration']).samples
    except Exception as error:  # every audio library has errors of its own
        raise ValueError(f"audio file {path} cannot be read: {error}") from error
    if samples.ndim > 1:
        raise ValueError(f"audio file {path} has {samples.shape[1]} channels; it must have one")
    return samples


def write_joined(manifests: list[Path], folder: Path, role: str, seconds: float) -> list[dict]:
    """Join what some manifests hold, unless that is done; returns the entries, with absolute paths.

    Args:
        manifests: the manifests.
        folder: of the data; gets ``ROLE.json`` and the audio.
        role: one of ``ROLES``.
        seconds: see :func:`grouped`.

    Raises:
        ValueError: as :func:`joined` does; and if other manifests were joined there.
    """
    manifest = folder / f'{role}.json'
    groups = grouped([entry for path in manifests for entry in read_manifest(path)], seconds)
    if not manifest.exists():
        (folder / role).mkdir(parents=True, exist_ok=True)
        write_manifest(manifest, [joined(group, folder / role) for group in tqdm(groups, desc=f'joining {role}')])
    entries = read_manifest(manifest)
    if [entry['utterance'] for entry in entries] != list(map(name_of, groups)):
        raise ValueError(
            f"{manifest} was joined of other utterances than --{role}; it needs a --work folder of its own"
        )
    return entries


def digest(entries: list[dict]) -> str:
    """Return a short digest of what is said, by whom and how long, which tells data apart."""
    said = [[entry['utterance'], entry['duration'], entry['text']] for entry in entries]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def check_speakers(trained: Iterable[dict], tested: Iterable[dict]) -> None:
    """Raise ValueError, naming the speakers, if somebody is heard in training and in the test."""
    shared = sorted({entry['speaker'] for entry in trained} & {entry['speaker'] for entry in tested})
    if shared:
        raise ValueError(f"speakers of the test are heard in training, too: {', '.join(shared)}")


def in_turn(entries: list[dict]) -> list[dict]:
    """Return the first utterance of each speaker, then the second of each, and so on."""
    rounds = zip_longest(*by_speaker(entries).values())
    return [entry for speakers in rounds for entry in speakers if entry is not None]


def subset(entries: list[dict], minutes: float) -> list[dict]:
    """Return the first entries that have so many minutes together; a smaller subset begins a larger one.

    Raises:
        ValueError: if there is not so much speech.
    """
    ends = np.cumsum([entry['duration'] for entry in entries])
    if not len(ends) or ends[-1] < 60 * minutes:
        raise ValueError(f"minutes is {minutes}; there are {ends[-1] / 60 if len(ends) else 0:.2f} to fine-tune on")
    return entries[: int(np.searchsorted(ends, 60 * minutes)) + 1]


def epochs(entries: list[dict], number: int, seed: int) -> list[dict]:
    """Return so many entries, epoch after epoch, each in an order that only the seed and the epoch decide."""
    ordered, epoch = [], 0
    while len(ordered) < number:
        order = np.random.default_rng([seed, epoch]).permutation(len(entries))
        ordered += [entries[index] for index in order]
        epoch += 1
    return ordered[:number]


def prepare(
    sources: dict[str, list[Path]], folder: Path, seconds: float, tuning_seconds: float
) -> dict[str, list[dict]]:
    """Join all data, unless that is done; returns the entries of each role.

    Args:
        sources: manifests by role; those of ``tuning`` and ``test`` have ``phones``.
        folder: of the data.
        seconds: see :func:`grouped`.
        tuning_seconds: the same for the role ``tuning``.

    Raises:
        ValueError: naming what cannot be read, or the speakers that are trained and tested on.
    """
    read = {role: [entry for path in paths for entry in read_manifest(path)] for role, paths in sources.items()}
    for role in ('tuning', 'test'):
        silent = [entry['audio_filepath'] for entry in read[role] if not entry.get('phones', '').split()]
        if silent:
            raise ValueError(f"{role}: {silent[0]} has no phones")
    for role in ('pretraining', 'validation', 'tuning'):
        check_speakers(read[role], read['test'])
    lengths = {role: tuning_seconds if role == 'tuning' else seconds for role in sources}
    return {role: write_joined(paths, folder, role, lengths[role]) for role, paths in sources.items()}
