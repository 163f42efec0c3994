# SPDX-License-Identifier: Apache-2.0
"""Mean, standard deviation and principal components of the features of a corpus, in one pass. New in this project.

Every utterance gives its count, mean and sum of squared deviations; these are merged pairwise in float64 and in the
order of the manifest (Chan, Golub and LeVeque, 1979), so neither the number of workers nor the batch size changes a
digit.

Shapes: D features, T feature frames, S targets (T // combine_time_steps), V values of a target
(combine_time_steps * D), C components.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.preprocessing.features import (
    WaveformFeaturizer,
    check_fixed_statistics,
    standardize_per_feature,
)
from nemo.collections.asr.parts.utils.manifest_index import read_entries
from nemo.collections.common.parts.preprocessing.manifest import get_full_path
from nemo.utils.atomic_files import replacing

# the preprocessor of NeMo's NEST configs
DEFAULT_PREPROCESSOR = {
    "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
    "sample_rate": 16000,
    "window_size": 0.025,
    "window_stride": 0.01,
    "window": "hann",
    "features": 80,
    "n_fft": 512,
    "log": True,
    "frame_splicing": 1,
}
# what must not touch the statistics: noise, normalisation, padding
NEUTRAL = {"normalize": "NA", "dither": 0.0, "pad_to": 0, "nb_augmentation_prob": 0.0}
# Utterances of the manifest whose targets are summed up at once, whatever --batch and --workers are. A sum has V * V
# numbers, 3 MB for NEST: one for each utterance would keep the processes busy with sending them.
UTTERANCES_AT_ONCE = 16


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of some frames, per feature.

    Attributes:
        count: number of frames.
        mean: float64 array [D].
        squares: float64 array [D], the sum of squared deviations from the mean.
        seconds: length of the audio.
    """

    count: int = 0
    mean: np.ndarray = 0.0
    squares: np.ndarray = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, features, seconds=0.0):
        """Return the moments of the array ``features``, [D, T]."""
        features = np.asarray(features, dtype=np.float64)
        if features.shape[1] == 0:
            return cls(seconds=seconds)
        mean = features.mean(axis=1)
        return cls(features.shape[1], mean, np.square(features - mean[:, None]).sum(axis=1), seconds)

    def merged(self, other):
        """Return the moments of these frames and the other's together."""
        count = self.count + other.count
        seconds = self.seconds + other.seconds
        if count == 0:
            return Moments(seconds=seconds)
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, squares, seconds)

    def statistics(self):
        """Return ``{"fixed_mean": [...], "fixed_std": [...]}``.

        Raises:
            ValueError: if there are fewer than two frames, or a feature is constant or not finite.
        """
        if self.count < 2:
            raise ValueError(f"the audio has {self.count} feature frames; statistics need at least 2")
        std = np.sqrt(self.squares / (self.count - 1))
        statistics = {"fixed_mean": self.mean.tolist(), "fixed_std": std.tolist()}
        check_fixed_statistics(statistics, name="the statistics of this audio cannot normalise:")
        return statistics


@dataclass
class Scatter:
    """Count, mean and centred second moments of some targets.

    Attributes:
        count: number of targets.
        mean: float64 array [V].
        products: float64 array [V, V], the sum of the outer products of the deviations from the mean.
        short: utterances without a single target.
    """

    count: int = 0
    mean: np.ndarray = 0.0
    products: np.ndarray = 0.0
    short: int = 0

    @classmethod
    def of(cls, utterances):
        """Return the scatter of the targets of some utterances, arrays [S, V]."""
        short = sum(len(targets) == 0 for targets in utterances)
        targets = np.concatenate([targets for targets in utterances if len(targets)] or [np.zeros((0, 1))])
        if len(targets) == 0:
            return cls(short=short)
        targets = targets.astype(np.float64)
        mean = targets.mean(axis=0)
        deviations = torch.from_numpy(targets - mean)
        return cls(len(targets), mean, (deviations.T @ deviations).numpy(), short)

    def merged(self, other):
        """Return the scatter of these targets and the other's together."""
        count, short = self.count + other.count, self.short + other.short
        if self.count == 0 or other.count == 0:
            return Scatter(count, self.mean + other.mean, self.products + other.products, short)
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return Scatter(count, mean, self.products + other.products + between, short)

    def scaled(self, factors):
        """Return the scatter of the targets with each value multiplied by its factor; ``factors``: array [V]."""
        return Scatter(self.count, self.mean * factors, self.products * np.outer(factors, factors), self.short)

    def components(self, number):
        """Return the principal components: eigenvectors [C, V], and eigenvalues and their shares of the variance [C].

        The largest number of an eigenvector is positive, for its sign means nothing.

        Raises:
            ValueError: if there are fewer values or targets than components.
        """
        if self.count <= number:
            raise ValueError(f"--components {number} needs {number + 1} targets or more; the audio has {self.count}")
        if len(self.mean) < number:
            raise ValueError(f"--components is {number}; a target has {len(self.mean)} values, and no more components")
        values, vectors = np.linalg.eigh(self.products / (self.count - 1))
        values, vectors = values[::-1][:number], vectors.T[::-1][:number]
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)
        return vectors * np.sign(largest), values, values / (np.trace(self.products) / (self.count - 1))


class TargetSettings(NamedTuple):
    """What the quantizer sees: how its features are normalised, and how many frames one target combines."""

    target_normalize: str
    combine_time_steps: int

    def targets_of(self, features):
        """Return the targets [S, V] float32 of an utterance's features [D, T] float32; for ``NA`` not yet normalised.

        Frames come one after the other, all features of the first one first. A remainder of frames makes no target.
        """
        count = features.shape[1] // self.combine_time_steps
        if count == 0:
            return np.zeros((0, 1), dtype=np.float32)
        if self.target_normalize == "per_feature":
            features = torch.from_numpy(features)[None]
            features = standardize_per_feature(features, torch.tensor([features.shape[2]]))[0].numpy()
        return features.T[: count * self.combine_time_steps].reshape(count, -1)


class Utterance(NamedTuple):
    """Where the audio of a manifest's entry is; offset and duration in seconds, 0 for all of the file."""

    path: str
    offset: float
    duration: float


def utterances_of(manifests) -> list[Utterance]:
    """Return the utterances of manifests; relative audio paths start at their manifest's folder.

    Raises:
        ValueError: naming the manifest and line that is missing, empty or wrong, or the audio that is missing.
    """
    found = []
    for manifest, number, entry in (line for path in manifests for line in read_entries(path)):
        try:
            path = get_full_path(entry['audio_filepath'], manifest)
            found.append(Utterance(path, *(float(entry.get(key) or 0.0) for key in ('offset', 'duration'))))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"manifest {manifest}, line {number} is no NeMo entry: {error!r}") from None
        if not isinstance(path, str) or not os.path.isfile(path):
            raise ValueError(f"manifest {manifest}, line {number}: there is no audio file {entry['audio_filepath']}")
    return found


class GroupStatistics(torch.utils.data.Dataset):
    """Moments of each utterance of a group, and the ``Scatter`` of its targets; or what went wrong, as a message.

    Args:
        utterances: grouped in order, ``UTTERANCES_AT_ONCE`` at a time.
        preprocessor: the config of NeMo's preprocessor.
        settings: of the targets; None: there is no scatter.

    Raises:
        ValueError: if the preprocessor cannot be made.
    """

    def __init__(self, utterances, preprocessor, settings=None):
        self.utterances, self.settings = utterances, settings
        config = OmegaConf.create({**preprocessor, **NEUTRAL})
        self.featurizer = WaveformFeaturizer(config.get("sample_rate", 16000))
        try:
            self.preprocessor = AudioToMelSpectrogramPreprocessor.from_config_dict(config).eval()
        except Exception as error:
            raise ValueError(f"NeMo cannot make the preprocessor of the config: {error}") from error

    def __len__(self):
        return -(-len(self.utterances) // UTTERANCES_AT_ONCE)

    def __getitem__(self, index):
        moments, targets = [], []
        for utterance in self.utterances[index * UTTERANCES_AT_ONCE :][:UTTERANCES_AT_ONCE]:
            try:
                samples = self.samples(utterance)
            except ValueError as error:  # a DataLoader would add a worker's traceback to it
                return str(error)
            features = self.features(samples)
            moments.append(Moments.of(features, len(samples) / self.featurizer.sample_rate))
            if self.settings is not None:
                targets.append(self.settings.targets_of(features))
        return moments, Scatter.of(targets)

    def samples(self, utterance: Utterance) -> torch.Tensor:
        """Return the samples [n] of an utterance, mixed down; raise ValueError naming a file that cannot be read."""
        try:
            return self.featurizer.process(utterance.path, offset=utterance.offset, duration=utterance.duration)
        except Exception as error:  # every audio library has errors of its own; a traceback would not name the file
            raise ValueError(f"audio file {utterance.path} cannot be read: {error}") from error

    def features(self, samples: torch.Tensor) -> np.ndarray:
        """Return the features of the samples [n] as a float32 array [D, T], valid frames only."""
        if len(samples) == 0:
            return np.zeros((1, 0), dtype=np.float32)
        features, lengths = self.preprocessor(input_signal=samples[None], length=torch.tensor([len(samples)]))
        return features[0, :, : lengths[0]].numpy()


def corpus_statistics(utterances, preprocessor, settings=None, workers=0, batch=8) -> tuple[Moments, Scatter]:
    """Return the ``Moments`` of all valid frames of all utterances, and the ``Scatter`` of the targets.

    Args:
        utterances: of :func:`utterances_of`.
        preprocessor: mapping, ``model.preprocessor`` of a NeMo config.
        settings: of the targets; None: the scatter is empty.
        workers: processes that read audio; 0: this one does.
        batch: utterances that a worker returns at once; it bounds memory and does not change the result.

    Raises:
        ValueError: naming the audio that cannot be read; for ``NA`` if the statistics cannot normalise.
    """
    groups, moments, scatter = GroupStatistics(utterances, preprocessor, settings), Moments(), Scatter()
    with tqdm(total=len(utterances), unit=" utterances") as bar:
        for each, together in _in_order(groups, workers, max(1, batch // UTTERANCES_AT_ONCE)):
            for one in each:
                moments = moments.merged(one)
            scatter = scatter.merged(together)
            bar.update(len(each))
    if settings is not None and settings.target_normalize == "NA" and scatter.count:
        std = np.asarray(moments.statistics()["fixed_std"])
        scatter = scatter.scaled(np.tile(1 / std, settings.combine_time_steps))
    return moments, scatter


def _in_order(dataset, workers: int, batch: int) -> Iterator:
    """Yield the items of a dataset; raise ValueError for one that is a message."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=list)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: another summation order would change the last digits
    try:
        for item in (item for items in loader for item in items):
            if isinstance(item, str):
                raise ValueError(item)
            yield item
    finally:
        torch.set_num_threads(threads)


def write_projection(path, scatter, settings, number):
    """Write the principal components to an .npz file whole or not at all; return their share of the variance.

    Raises:
        ValueError: if there are not as many components.
    """
    components, eigenvalues, shares = scatter.components(number)
    arrays = dict(components=components, eigenvalues=eigenvalues, variance_share=shares, count=scatter.count)
    features = components.shape[1] // settings.combine_time_steps
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            **arrays,
            normalization=settings.target_normalize,
            combine_time_steps=settings.combine_time_steps,
            features=features,
        )
    return float(shares.sum())
