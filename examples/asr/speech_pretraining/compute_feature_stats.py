# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Compute the mean and standard deviation of every feature over a corpus, in one pass.

    python compute_feature_stats.py --manifest train_manifest.json --output stats.yaml [--config model_config.yaml]

Streaming models cannot normalise by the statistics of a whole utterance, and un-normalised features make the targets of
BEST-RQ collapse into a few codes. Fixed statistics of the training corpus stream. ``stats.yaml`` holds the two lists
``fixed_mean`` and ``fixed_std``, one number per feature: what NeMo's ``model.preprocessor.normalize`` takes.
hierarchical_streaming_nest.py reads it with ``model.preprocessor.normalize=stats.yaml``; for another NeMo script, put the two
lists into its config, or give Hydra ``'model.preprocessor.normalize={fixed_mean: [...], fixed_std: [...]}'``.

Every utterance gives its count, mean and sum of squared deviations; these are merged pairwise in float64 and in the
order of the manifest (Chan, Golub and LeVeque, 1979), so neither the number of workers nor the batch size changes a
digit. The standard deviation has n - 1 in its denominator, as NeMo's ``per_feature`` normalisation has.
"""

from script_tools import manifest_lines, report_error, require_patches, write_text

require_patches(__file__, "nemo.collections.asr.parts.preprocessing.features")

import argparse
import json
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.preprocessing.features import check_fixed_statistics
from nemo.collections.asr.parts.preprocessing.segment import AudioSegment
from nemo.collections.common.parts.preprocessing.manifest import get_full_path

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
        path, offset, duration = self.entries[index]
        try:
            samples = AudioSegment.from_file(path, self.sample_rate, offset=offset, duration=duration).samples
        except Exception as error:  # every audio library has errors of its own; a traceback would not name the file
            return f"audio file {path} cannot be read: {error}"
        if samples.ndim > 1:
            return f"audio file {path} has {samples.shape[1]} channels; it must have one"
        return Moments.of(self.features(samples), len(samples) / self.sample_rate)

    def features(self, samples):
        """Return the features of the samples [n] as a float32 array [D, T], valid frames only."""
        if len(samples) == 0:
            return np.zeros((1, 0), dtype=np.float32)
        signal, length = torch.from_numpy(samples)[None].float(), torch.tensor([len(samples)])
        features, lengths = self.preprocessor(input_signal=signal, length=length)
        return features[0, :, : lengths[0]].numpy()


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
    dataset = UtteranceMoments(entries, preprocessor or DEFAULT_PREPROCESSOR)
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=list)
    total = Moments()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: another summation order would change the last digits
    try:
        with tqdm(total=len(entries), unit=" utterances", disable=not progress) as bar:
            for item in (item for items in loader for item in items):
                if isinstance(item, str):
                    raise ValueError(item)
                total = total.merged(item)
                bar.update()
    finally:
        torch.set_num_threads(threads)
    return total


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


def arguments(argv):
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", nargs="+", required=True, help="one or more NeMo manifests")
    parser.add_argument("--output", required=True, help="the yaml file to write")
    parser.add_argument("--config", help="NeMo config whose model.preprocessor to use (default: that of NEST)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read audio (default: this one does)")
    parser.add_argument("--batch", type=int, default=8, help="utterances that a worker returns at once")
    options = parser.parse_args(argv)
    if options.workers < 0 or options.batch < 1:
        parser.error("--workers must be at least 0 and --batch at least 1")
    return options


def main(argv=None):
    """Run the command line; return the exit status."""
    options = arguments(argv)
    try:
        folder = os.path.dirname(os.path.abspath(options.output))
        if not os.path.isdir(folder):  # found out now, not after the pass over the audio
            raise ValueError(f"--output {options.output}: there is no folder {folder}")
        preprocessor = read_preprocessor(options.config)
        entries = read_manifests(options.manifest)
        moments = corpus_moments(entries, preprocessor, options.workers, options.batch)
        statistics = moments.statistics()
        write_statistics(options.output, statistics, _notes(options, preprocessor, entries, moments))
    except (ValueError, OSError) as error:
        return report_error(__file__, error, status=1)
    print(
        f"{options.output}: {len(statistics['fixed_mean'])} features over {moments.count} frames "
        f"({moments.seconds / 3600:.2f} h, {len(entries)} utterances).\n"
        f"Use it with model.preprocessor.normalize={options.output} in hierarchical_streaming_nest.py; "
        "in any other NeMo config its two lists go under model.preprocessor.normalize."
    )
    return 0


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
