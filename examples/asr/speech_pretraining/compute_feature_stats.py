# SPDX-License-Identifier: Apache-2.0
"""Compute the mean and standard deviation of every feature over a corpus, in one pass.

    python compute_feature_stats.py --manifest train_manifest.json --output stats.yaml [--config model_config.yaml]

Streaming models cannot normalise by the statistics of a whole utterance, and un-normalised features make the targets of
BEST-RQ collapse into a few codes. Fixed statistics of the training corpus stream. ``stats.yaml`` holds the two lists
``fixed_mean`` and ``fixed_std``, one number per feature: what NeMo's ``model.preprocessor.normalize`` takes.
pretrain.py reads it with ``model.preprocessor.normalize=stats.yaml``; for another NeMo script, put the two
lists into its config, or give Hydra ``'model.preprocessor.normalize={fixed_mean: [...], fixed_std: [...]}'``.

Every utterance gives its count, mean and sum of squared deviations; these are merged pairwise in float64 and in the
order of the manifest (Chan, Golub and LeVeque, 1979), so neither the number of workers nor the batch size changes a
digit. The standard deviation has n - 1 in its denominator, as NeMo's ``per_feature`` normalisation has.

With ``--pca pca.npz`` the same pass finds the principal components of what BEST-RQ's quantizer sees: runs of
``--combine_time_steps`` feature frames side by side, normalised per utterance (``--target_normalize per_feature``) or
by the statistics of the corpus (``NA``). They can take the place of its random projection, see
https://arxiv.org/abs/2606.30671: ``model.quantizer.projection=pca model.quantizer.projection_file=pca.npz``.

Shapes: D features, T feature frames, S targets (T // combine_time_steps), V values of a target
(combine_time_steps * D), C components.
"""

from script_tools import manifest_lines, report_error, require_patches, write_text

require_patches(__file__, "nemo.collections.asr.parts.preprocessing.features")

import argparse
import json
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.preprocessing.features import check_fixed_statistics, standardize_per_feature
from nemo.collections.asr.parts.preprocessing.segment import AudioSegment
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
DEFAULT_COMPONENTS = 64
PCA_OPTIONS = ("combine_time_steps", "components", "target_normalize")  # those that are of use only with --pca
TARGET_NORMALIZATIONS = ("per_feature", "NA")
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


def read_manifests(paths):
    """Return ``(audio path, offset, duration)`` of every entry, offsets and durations in seconds.

    Args:
        paths: NeMo manifests; relative audio paths start at their manifest's folder.

    Raises:
        ValueError: naming the manifest and line that is missing, empty or wrong, or the audio that is missing.
    """
    entries = []
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"manifest {path}: there is no such file")
        entries.extend(_entry(path, number, line) for number, line in manifest_lines(path))
    return entries


def _entry(manifest, number, line):
    """Return ``(audio path, offset, duration)`` of one manifest line."""
    try:
        item = json.loads(line)
        audio, offset, duration = item["audio_filepath"], item.get("offset") or 0.0, item.get("duration") or 0.0
        path, offset, duration = get_full_path(audio, manifest), float(offset), float(duration)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"manifest {manifest}, line {number} is no NeMo entry: {error!r}") from None
    if not os.path.isfile(path):
        raise ValueError(f"manifest {manifest}, line {number}: there is no audio file {audio}")
    return path, offset, duration


class UtteranceMoments(torch.utils.data.Dataset):
    """The moments of each utterance's features, or the message of what went wrong with it.

    Args:
        entries: what ``read_manifests`` returned.
        preprocessor: the config of NeMo's preprocessor.

    Raises:
        ValueError: if the preprocessor cannot be made.
    """

    def __init__(self, entries, preprocessor):
        self.entries = entries
        config = OmegaConf.create({**preprocessor, **NEUTRAL})
        self.sample_rate = config.get("sample_rate", 16000)
        try:
            self.preprocessor = AudioToMelSpectrogramPreprocessor.from_config_dict(config).eval()
        except Exception as error:
            raise ValueError(f"NeMo cannot make the preprocessor of the config: {error}") from error

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        try:
            samples = self.samples(index)
        except ValueError as error:  # a DataLoader would add a worker's traceback to it
            return str(error)
        return Moments.of(self.features(samples), len(samples) / self.sample_rate)

    def samples(self, index):
        """Return the samples [n] of an utterance; raise ValueError naming the file if it cannot be read as mono."""
        path, offset, duration = self.entries[index]
        try:
            samples = AudioSegment.from_file(path, self.sample_rate, offset=offset, duration=duration).samples
        except Exception as error:  # every audio library has errors of its own; a traceback would not name the file
            raise ValueError(f"audio file {path} cannot be read: {error}") from error
        if samples.ndim > 1:
            raise ValueError(f"audio file {path} has {samples.shape[1]} channels; it must have one")
        return samples

    def features(self, samples):
        """Return the features of the samples [n] as a float32 array [D, T], valid frames only."""
        if len(samples) == 0:
            return np.zeros((1, 0), dtype=np.float32)
        signal, length = torch.from_numpy(samples)[None].float(), torch.tensor([len(samples)])
        features, lengths = self.preprocessor(input_signal=signal, length=length)
        return features[0, :, : lengths[0]].numpy()


class GroupMoments(torch.utils.data.Dataset):
    """A group's ``Moments``, a list with one for each utterance, and its ``Scatter``; or what went wrong, as a message.

    Args:
        utterances: an ``UtteranceMoments``; its entries are grouped in order, ``UTTERANCES_AT_ONCE`` at a time.
        settings: the ``TargetSettings``.
    """

    def __init__(self, utterances, settings):
        self.utterances, self.settings = utterances, settings

    def __len__(self):
        return -(-len(self.utterances) // UTTERANCES_AT_ONCE)

    def __getitem__(self, index):
        first = index * UTTERANCES_AT_ONCE
        moments, targets = [], []
        for utterance in range(first, min(first + UTTERANCES_AT_ONCE, len(self.utterances))):
            try:
                samples = self.utterances.samples(utterance)
            except ValueError as error:
                return str(error)
            features = self.utterances.features(samples)
            moments.append(Moments.of(features, len(samples) / self.utterances.sample_rate))
            targets.append(self.settings.targets_of(features))
        return moments, Scatter.of(targets)


def corpus_moments(entries, preprocessor=None, workers=0, batch=8, progress=True):
    """Return the ``Moments`` of all valid frames of all utterances.

    Args:
        entries: what ``read_manifests`` returned.
        preprocessor: mapping, ``model.preprocessor`` of a NeMo config; None: that of the NEST configs.
        workers: processes that read audio; 0: this one does.
        batch: utterances that a worker returns at once; it bounds memory and does not change the result.
        progress: whether to show a progress bar.

    Raises:
        ValueError: naming the audio that cannot be read, or if the preprocessor cannot be made.
    """
    utterances, total = UtteranceMoments(entries, preprocessor or DEFAULT_PREPROCESSOR), Moments()
    with tqdm(total=len(entries), unit=" utterances", disable=not progress) as bar:
        for moments in _in_order(utterances, workers, batch):
            total = total.merged(moments)
            bar.update()
    return total


def corpus_moments_and_scatter(entries, settings, preprocessor=None, workers=0, batch=8, progress=True):
    """Return the ``Moments`` as ``corpus_moments`` does, digit for digit, and the ``Scatter`` of the targets.

    Args:
        settings: the ``TargetSettings``.
        entries, preprocessor, workers, batch, progress: those of ``corpus_moments``; ``batch`` is rounded to groups.

    Raises:
        ValueError: as ``corpus_moments`` does; and for ``NA`` if the statistics cannot normalise.
    """
    utterances = UtteranceMoments(entries, preprocessor or DEFAULT_PREPROCESSOR)
    groups, moments, scatter = GroupMoments(utterances, settings), Moments(), Scatter()
    with tqdm(total=len(entries), unit=" utterances", disable=not progress) as bar:
        for each, together in _in_order(groups, workers, max(1, batch // UTTERANCES_AT_ONCE)):
            for one in each:
                moments = moments.merged(one)
            scatter = scatter.merged(together)
            bar.update(len(each))
    if settings.target_normalize == "NA" and scatter.count:
        std = np.asarray(moments.statistics()["fixed_std"])
        scatter = scatter.scaled(np.tile(1 / std, settings.combine_time_steps))
    return moments, scatter


def _in_order(dataset, workers, batch):
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


def read_preprocessor(path):
    """Return ``model.preprocessor`` of a NeMo training or model config as a dict, interpolations resolved.

    Args:
        path: yaml file; None for the preprocessor of NeMo's NEST configs.

    Raises:
        ValueError: naming the file, if it cannot be read or has no preprocessor.
    """
    if path is None:
        return DEFAULT_PREPROCESSOR
    try:
        config = OmegaConf.load(path)
        found = OmegaConf.select(config, "model.preprocessor") or OmegaConf.select(config, "preprocessor")
        if not isinstance(found, DictConfig):
            raise ValueError("it has no model.preprocessor")
        found.update(NEUTRAL)  # before resolving: a normalize that is yet to be filled in does no harm
        return OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
    except Exception as error:
        raise ValueError(f"config {path}: {error}") from error


def read_target_settings(path, target_normalize=None, combine_time_steps=None):
    """Return the ``TargetSettings`` of a command line, else of a NeMo config, else those of the NEST configs.

    Args:
        path: yaml file with ``model.target_normalize`` (null is ``NA``, as for the model) and
            ``model.quantizer.combine_time_steps``; None: no file.
        target_normalize, combine_time_steps: those of the command line; None: not given.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    config = OmegaConf.create({}) if path is None else OmegaConf.load(path)
    if target_normalize is None:
        target_normalize = OmegaConf.select(config, "model.target_normalize", default="per_feature") or "NA"
    if combine_time_steps is None:
        combine_time_steps = OmegaConf.select(config, "model.quantizer.combine_time_steps", default=8)
    settings = TargetSettings(target_normalize, combine_time_steps)
    if settings.target_normalize not in TARGET_NORMALIZATIONS:
        allowed = " or ".join(TARGET_NORMALIZATIONS)
        raise ValueError(f"--target_normalize is {settings.target_normalize!r}; it must be {allowed}")
    if not isinstance(settings.combine_time_steps, int) or settings.combine_time_steps < 1:
        raise ValueError(f"--combine_time_steps is {settings.combine_time_steps!r}; it must be 1 or more")
    return settings


def write_statistics(path, statistics, notes):
    """Write the two lists to ``path`` whole or not at all, with ``notes`` as comments above them.

    Args:
        path: the yaml file.
        statistics: ``{"fixed_mean": [...], "fixed_std": [...]}``.
        notes: lines of text.
    """
    lines = [f"# {note}" for note in notes]
    lines += [f"{key}: [{', '.join(map(repr, values))}]" for key, values in statistics.items()]
    write_text(path, "\n".join(lines) + "\n")


def write_projection(path, scatter, settings, number):
    """Write the principal components to an .npz file whole or not at all.

    Args:
        path: the file.
        scatter: of the targets, normalised.
        settings: the ``TargetSettings``.
        number: of components.

    Returns:
        the share of the variance that the components have together, from 0 to 1.

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


def arguments(argv):
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", nargs="+", required=True, help="one or more NeMo manifests")
    parser.add_argument("--output", required=True, help="the yaml file to write")
    parser.add_argument("--config", help="NeMo config whose model.preprocessor to use (default: that of NEST)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read audio (default: this one does)")
    parser.add_argument("--batch", type=int, default=8, help="utterances that a worker returns at once")
    _add_pca_arguments(parser)
    options = parser.parse_args(argv)
    if options.workers < 0 or options.batch < 1:
        parser.error("--workers must be at least 0 and --batch at least 1")
    unused = [name for name in PCA_OPTIONS if getattr(options, name) is not None] if options.pca is None else []
    if unused:
        parser.error(f"--{unused[0]} is of use only with --pca")
    if options.components is not None and options.components < 1:
        parser.error(f"--components is {options.components}; it must be 1 or more")
    return options


def _add_pca_arguments(parser):
    """Add the options of the principal components."""
    parser.add_argument("--pca", help="the .npz file to write with the principal components of the quantizer's input")
    parser.add_argument("--combine_time_steps", type=int, help="frames in a target (default: that of --config, or 8)")
    parser.add_argument("--components", type=int, help=f"how many to write (default: {DEFAULT_COMPONENTS})")
    parser.add_argument(
        "--target_normalize",
        choices=TARGET_NORMALIZATIONS,
        help="how the quantizer's input is normalised (default: as --config says, or per_feature)",
    )


def main(argv=None):
    """Run the command line; return the exit status."""
    options = arguments(argv)
    try:
        for option in ("output", "pca"):
            _check_folder(option, getattr(options, option))
        preprocessor = read_preprocessor(options.config)
        entries = read_manifests(options.manifest)
        said = (_statistics_alone if options.pca is None else _with_components)(options, preprocessor, entries)
    except (ValueError, OSError) as error:
        return report_error(__file__, error)
    print(said)
    return 0


def _check_folder(option, path):
    """Raise ValueError if the folder of an output file is missing: now, not after the pass over the audio."""
    folder = None if path is None else os.path.dirname(os.path.abspath(path))
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"--{option} {path}: there is no folder {folder}")


def _statistics_alone(options, preprocessor, entries):
    """Compute and write the statistics; return what to print."""
    moments = corpus_moments(entries, preprocessor, options.workers, options.batch)
    return _write_moments(options, preprocessor, entries, moments)


def _with_components(options, preprocessor, entries):
    """Compute and write the statistics and the principal components in one pass; return what to print."""
    settings = read_target_settings(options.config, options.target_normalize, options.combine_time_steps)
    loading = preprocessor, options.workers, options.batch
    moments, scatter = corpus_moments_and_scatter(entries, settings, *loading)
    number = DEFAULT_COMPONENTS if options.components is None else options.components
    moments.statistics()  # if it cannot be done it is found out before the first file is written
    share = write_projection(options.pca, scatter, settings, number)
    combine = settings.combine_time_steps
    short = f"Utterances shorter than one target ({combine} frames), which add nothing: {scatter.short}.\n"
    return (
        f"{_write_moments(options, preprocessor, entries, moments)}\n"
        f"{options.pca}: {number} principal components with {share:.1%} of the variance, over {scatter.count} targets "
        f"of {combine} frames, target_normalize {settings.target_normalize}.\n"
        f"{short if scatter.short else ''}"
        f"Use them with model.quantizer.projection=pca model.quantizer.projection_file={options.pca}"
    )


def _write_moments(options, preprocessor, entries, moments):
    """Write the statistics; return what to print of them."""
    statistics = moments.statistics()
    write_statistics(options.output, statistics, _notes(options, preprocessor, entries, moments))
    return (
        f"{options.output}: {len(statistics['fixed_mean'])} features over {moments.count} frames "
        f"({moments.seconds / 3600:.2f} h, {len(entries)} utterances).\n"
        f"Use it with model.preprocessor.normalize={options.output} in pretrain.py; "
        "in any other NeMo config its two lists go under model.preprocessor.normalize."
    )


def _notes(options, preprocessor, entries, moments):
    """Return what the yaml file's comments say of where its numbers come from."""
    kept = {key: value for key, value in preprocessor.items() if key not in NEUTRAL and key != "_target_"}
    return [
        "Mean and standard deviation per feature, for model.preprocessor.normalize.",
        f"manifests: {', '.join(map(os.path.basename, options.manifest))}",
        f"{len(entries)} utterances, {moments.seconds / 3600:.4f} h, {moments.count} frames",
        f"preprocessor: {json.dumps(kept)}",
    ]


if __name__ == "__main__":
    sys.exit(main())
