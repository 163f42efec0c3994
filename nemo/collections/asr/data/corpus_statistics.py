# SPDX-License-Identifier: Apache-2.0
"""Mean, deviation and principal components of a corpus' features, in one pass. New in this project.

The moments of utterances are merged pairwise, in float64 and in the order of the manifest (Chan, Golub and LeVeque, 1979), so
the number of workers changes no digit.

Shapes: N vectors, D features, T feature frames, S targets (T // combine_time_steps), V values of a target
(combine_time_steps * D), C components.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from nemo.collections.asr.data.audio_files import read_entry
from nemo.collections.asr.data.loader_workers import in_order
from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.preprocessing.features import check_fixed_statistics, standardize_per_feature
from nemo.utils.atomic_files import replacing

# of NeMo's NEST configs; the rest are the class's defaults
DEFAULT_PREPROCESSOR = {
    "sample_rate": 16000,
    "window_size": 0.025,
    "window_stride": 0.01,
    "features": 80,
    "n_fft": 512,
}
NEUTRAL = {"normalize": "NA", "dither": 0.0, "pad_to": 0, "nb_augmentation_prob": 0.0}  # these must not change them
UTTERANCES_AT_ONCE = 16  # in an item, whatever --workers is: its second moments are V * V numbers, 3 MB for NEST


@dataclass(frozen=True)
class Moments:
    """Count, mean and centred second moments of vectors, features or targets."""

    count: int = 0
    mean: Any = 0.0  # float64 [V]
    squares: Any = 0.0  # float64 [V, V], the sum of the outer products of deviations from the mean
    seconds: float = 0.0  # of audio
    short: int = 0  # utterances without a vector

    @classmethod
    def of(cls, vectors: np.ndarray, **audio) -> 'Moments':
        """Return the moments of the columns of an array [V, N]."""
        values = torch.from_numpy(vectors).double()
        mean = values.sum(dim=1) / max(values.shape[1], 1)
        deviations = values - mean[:, None]
        return cls(values.shape[1], mean.numpy(), (deviations @ deviations.T).numpy(), **audio)

    def merged(self, other: 'Moments') -> 'Moments':
        """Return the moments of these vectors and the other's together."""
        count, delta = self.count + other.count, other.mean - self.mean
        part = other.count / max(count, 1)
        squares = self.squares + other.squares + np.outer(delta, delta) * (self.count * part)
        return Moments(
            count, self.mean + delta * part, squares, self.seconds + other.seconds, self.short + other.short
        )

    def statistics(self) -> dict[str, list[float]]:
        """Return ``fixed_mean`` and ``fixed_std``; ValueError if a feature cannot be normalised by them."""
        if self.count < 2:
            raise ValueError(f"the audio has {self.count} feature frames; statistics need at least 2")
        std = np.sqrt(np.diagonal(self.squares) / (self.count - 1))
        statistics = {"fixed_mean": self.mean.tolist(), "fixed_std": std.tolist()}
        check_fixed_statistics(statistics, name="the statistics of this audio cannot normalise:")
        return statistics


class TargetSettings(NamedTuple):
    """What the quantizer sees: how its features are normalised, and how many frames one target combines."""

    target_normalize: str
    combine_time_steps: int

    def targets_of(self, features: np.ndarray) -> np.ndarray:
        """Return an utterance's targets [S, V] from features [D, T], both float32; ``NA``: not yet normalised."""
        count = features.shape[1] // self.combine_time_steps
        if self.target_normalize == "per_feature" and count:
            features = torch.from_numpy(features)[None]
            features = standardize_per_feature(features, torch.tensor([features.shape[2]]))[0].numpy()
        used = features.T[: count * self.combine_time_steps]
        return used.reshape(count, self.combine_time_steps * features.shape[0])


class GroupStatistics(torch.utils.data.Dataset):
    """Moments of the features and targets of a group of utterances, or an error message."""

    def __init__(self, utterances: list[dict], preprocessor, settings: TargetSettings | None = None):
        self.utterances, self.settings = utterances, settings
        default = {"_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor"}
        config = OmegaConf.create({**default, **preprocessor, **NEUTRAL})
        self.rate = config.get("sample_rate", 16000)
        try:
            self.preprocessor = AudioToMelSpectrogramPreprocessor.from_config_dict(config).eval()
        except Exception as error:
            raise ValueError(f"NeMo cannot make the preprocessor of the config: {error}") from error

    def __len__(self) -> int:
        return -(-len(self.utterances) // UTTERANCES_AT_ONCE)

    def __getitem__(self, index: int):
        moments, targets = Moments(), []
        for utterance in self.utterances[index * UTTERANCES_AT_ONCE :][:UTTERANCES_AT_ONCE]:
            try:
                samples = torch.from_numpy(read_entry(utterance, self.rate))
            except ValueError as error:  # a DataLoader would add a worker's traceback to it
                return str(error)
            features, lengths = self.preprocessor(input_signal=samples[None], length=torch.tensor([len(samples)]))
            features = features[0, :, : lengths[0]].numpy()
            moments = moments.merged(Moments.of(features, seconds=len(samples) / self.rate))
            if self.settings is not None:
                targets.append(self.settings.targets_of(features))
        if not targets:
            return moments, Moments()
        short = sum(len(each) == 0 for each in targets)
        return moments, Moments.of(np.concatenate(targets).T, short=short)


def corpus_statistics(utterances: list[dict], preprocessor, settings=None, workers=0) -> tuple[Moments, Moments]:
    """Return the moments of all valid frames of entries with absolute paths, and of the targets.

    Without ``settings`` the targets have no moments. With 0 workers this process reads the audio. ValueError names the audio that
    cannot be read, or, for ``NA``, the feature that the statistics cannot normalise.
    """
    moments = targets = Moments()
    groups, unit = GroupStatistics(utterances, preprocessor, settings), f" x {UTTERANCES_AT_ONCE} utterances"
    for of_features, of_targets in tqdm(in_order(groups, workers), total=len(groups), unit=unit):
        moments, targets = moments.merged(of_features), targets.merged(of_targets)
    if settings is not None and settings.target_normalize == "NA" and targets.count:
        scale = np.tile(1 / np.asarray(moments.statistics()["fixed_std"]), settings.combine_time_steps)
        targets = replace(targets, mean=targets.mean * scale, squares=targets.squares * np.outer(scale, scale))
    return moments, targets


def write_projection(path, targets: Moments, settings: TargetSettings, number: int) -> float:
    """Write the first principal components to an .npz file; return their share of the variance.

    The largest number of a component is positive, for its sign means nothing. Too few values or targets are a ValueError.
    """
    if targets.count <= number:
        raise ValueError(f"--components {number} needs {number + 1} targets or more; the audio has {targets.count}")
    if len(targets.mean) < number:
        raise ValueError(f"--components is {number}; a target has {len(targets.mean)} values, and no more components")
    covariance = targets.squares / (targets.count - 1)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1][:number], vectors.T[::-1][:number]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)
    shares = values / np.trace(covariance)
    arrays = {
        "components": vectors * np.sign(largest),  # [C, V]
        "eigenvalues": values,
        "variance_share": shares,
        "count": targets.count,
        "normalization": settings.target_normalize,
        "combine_time_steps": settings.combine_time_steps,
        "features": len(targets.mean) // settings.combine_time_steps,
    }
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)
    return float(shares.sum())
