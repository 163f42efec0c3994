# SPDX-License-Identifier: Apache-2.0
"""The speech of the comparison: mel features, joined for pre-training, chosen for the probe.

Shapes: D features, T feature frames of 10 ms.
"""

import json
import random
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from phones import labels_of
from tqdm import tqdm

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.preprocessing.segment import AudioSegment
from nemo.utils.atomic_files import replacing

RATE = 16000
FRAMES_OF_A_SECOND = 100
ROLES = ('pretraining', 'validation', 'probe', 'test')


class Utterance(NamedTuple):
    """An utterance, or several of one speaker."""

    features: torch.Tensor
    """Log-mel features [D, T], float16, not normalised."""
    labels: list[int]
    """Its phones."""
    speaker: str

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.features.shape[1] / FRAMES_OF_A_SECOND


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


def by_speaker(utterances: Iterable[Utterance]) -> dict[str, list[Utterance]]:
    """Return the utterances of each speaker, speakers and utterances in the order given."""
    found = {}
    for utterance in utterances:
        found.setdefault(utterance.speaker, []).append(utterance)
    return found


def joined(utterances: Iterable[Utterance], seconds: float) -> list[Utterance]:
    """Join a speaker's utterances in order to results of so many seconds; the last one gets the rest."""
    found = []
    for speaker, own in by_speaker(utterances).items():
        groups, length = [[]], 0.0
        for utterance in own:
            if length >= seconds:
                groups.append([])
                length = 0.0
            groups[-1].append(utterance)
            length += utterance.seconds
        if length < seconds and len(groups) > 1:
            rest = groups.pop()
            groups[-1] += rest
        for group in groups:
            features = torch.cat([utterance.features for utterance in group], dim=1)
            found.append(Utterance(features, [label for utterance in group for label in utterance.labels], speaker))
    return found


def in_turn(utterances: Iterable[Utterance]) -> list[Utterance]:
    """Return the first utterance of each speaker, then the second of each, and so on."""
    rounds = zip_longest(*by_speaker(utterances).values())
    return [utterance for speakers in rounds for utterance in speakers if utterance is not None]


def chosen(utterances: Iterable[Utterance], minutes: float, longest: float) -> list[Utterance]:
    """Return utterances of at most so many seconds, speakers in turn, until they have so many minutes."""
    found, seconds = [], 0.0
    for utterance in in_turn(utterances):
        if utterance.seconds <= longest and seconds < 60 * minutes:
            found.append(utterance)
            seconds += utterance.seconds
    return found


def check_speakers(trained: Iterable[Utterance], tested: Iterable[Utterance]) -> None:
    """Raise ValueError, naming the speakers, if a speaker of the test is in other data, too."""
    shared = sorted({entry.speaker for entry in trained} & {entry.speaker for entry in tested})
    if shared:
        raise ValueError(f"speakers of the test are in other data, too: {', '.join(shared)}")


def extract(manifest: Path) -> list[Utterance]:
    """Compute the features of a manifest.

    Raises:
        ValueError: naming the audio that cannot be read, or an unknown phone.
    """
    preprocessor = AudioToMelSpectrogramPreprocessor(
        sample_rate=RATE, normalize='NA', features=80, n_fft=512, dither=0.0, pad_to=0
    )
    found = []
    for entry in tqdm(read_manifest(manifest), desc=f'features of {manifest.name}'):
        path = entry['audio_filepath']
        try:
            samples = AudioSegment.from_file(path, target_sr=RATE).samples
        except Exception as error:  # every audio library has errors of its own
            raise ValueError(f"audio file {path} cannot be read: {error}") from error
        samples = torch.from_numpy(samples).float()[None]
        features, length = preprocessor(input_signal=samples, length=torch.tensor([samples.shape[1]]))
        labels = labels_of(entry.get('phones', ''), path)
        found.append(Utterance(features[0, :, : int(length)].half(), labels, entry['speaker']))
    return found


class Speech:
    """All speech of the comparison.

    Args:
        utterances: of each of ``ROLES``.
        seconds: of a joined utterance of pre-training.
        minutes: to fit a probe on.
        tested: utterances of the test.
        longest: seconds of an utterance of probe and test.

    Raises:
        ValueError: if a speaker of the test is in other data, too.
    """

    def __init__(
        self,
        utterances: dict[str, list[Utterance]],
        seconds=16.0,
        minutes=60.0,
        tested: int = 400,
        longest: float = 7.0,
    ):
        for role in ('pretraining', 'validation', 'probe'):
            check_speakers(utterances[role], utterances['test'])
        self.pretraining = joined(utterances['pretraining'], seconds)
        self.validation = utterances['validation']
        self.probe = chosen(utterances['probe'], minutes, longest)
        self.test = chosen(utterances['test'], float('inf'), longest)[:tested]
        sample = torch.cat([utterance.features.float() for utterance in self.pretraining[::4]], dim=1)
        self.mean, self.std = sample.mean(dim=1, keepdim=True), sample.std(dim=1, keepdim=True)

    @classmethod
    def load(cls, manifests: dict[str, list[Path]], cache: Path, **sizes) -> 'Speech':
        """Load the speech of manifests by role; the features are computed once, into a file.

        Raises:
            ValueError: naming what cannot be read, or a manifest of probe or test with an utterance without phones.
        """
        if not cache.exists():
            found = {path: extract(path) for path in dict.fromkeys(path for role in ROLES for path in manifests[role])}
            for path in (*manifests['probe'], *manifests['test']):
                if not all(utterance.labels for utterance in found[path]):
                    raise ValueError(f"{path} has utterances without phones")
            utterances = {role: [one for path in manifests[role] for one in found[path]] for role in ROLES}
            with replacing(cache) as partial:
                torch.save({role: list(map(tuple, found)) for role, found in utterances.items()}, partial)
        saved = torch.load(cache)
        return cls({role: [Utterance(*parts) for parts in found] for role, found in saved.items()}, **sizes)

    def batch(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise features [D, T] by the pre-training statistics; return [B, D, T] and lengths [B]."""
        lengths = torch.tensor([each.shape[1] for each in features])
        padded = torch.zeros(len(features), features[0].shape[0], int(lengths.max()))
        for row, each in zip(padded, features):
            row[:, : each.shape[1]] = (each.float() - self.mean) / self.std
        return padded, lengths

    def crops(self, seed: int, step: int, number: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch of a step of pre-training, a function of seed and step: crops of joined utterances."""
        drawn = random.Random(f'{seed} {step}')
        cut = []
        for utterance in drawn.choices(self.pretraining, k=number):
            start = drawn.randint(0, max(0, utterance.features.shape[1] - frames))
            cut.append(utterance.features[:, start : start + frames])
        return self.batch(cut)

    def batches(self, utterances: list[Utterance], size: int = 16) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Yield utterances, in order, as batches."""
        for start in range(0, len(utterances), size):
            yield self.batch([utterance.features for utterance in utterances[start : start + size]])
