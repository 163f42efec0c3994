# SPDX-License-Identifier: Apache-2.0
"""Compute the mean and standard deviation of every feature over a corpus, in one pass.

    python compute_feature_stats.py --manifest train_manifest.json --output stats.yaml [--config model_config.yaml]

A streaming model cannot normalise by the statistics of the whole utterance, but by those of the training corpus. Without
any normalisation almost all targets are the same few codes. ``stats.yaml`` has two lists, ``fixed_mean`` and
``fixed_std``, with one number per feature. Pass it to pretrain.py with ``model.preprocessor.normalize=stats.yaml``. For
another NeMo script put the two lists into its config, or pass to Hydra
``'model.preprocessor.normalize={fixed_mean: [...], fixed_std: [...]}'``.

``--pca pca.npz`` also computes the principal components of the quantizer's input: ``--combine_time_steps`` adjacent
feature frames, normalised per utterance (``--target_normalize per_feature``) or by the statistics of the corpus (``NA``).
To use them in place of the random projection (https://arxiv.org/abs/2606.30671), set
``model.quantizer.projection=pca model.quantizer.projection_file=pca.npz``.
"""

from script_tools import check_folders, report_error, require_patches

require_patches(__file__)

import argparse
import json
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo.collections.asr.data.audio_files import audio_entries
from nemo.collections.asr.data.corpus_statistics import (
    DEFAULT_PREPROCESSOR,
    NEUTRAL,
    TargetSettings,
    corpus_statistics,
    write_projection,
)
from nemo.utils.atomic_files import write_text

DEFAULT_COMPONENTS = 64
PCA_OPTIONS = ("combine_time_steps", "components", "target_normalize")  # those that are of use only with --pca
TARGET_NORMALIZATIONS = ("per_feature", "NA")


def read_preprocessor(path):
    """Return a NeMo config's ``model.preprocessor`` as a dict; without a path that of the NEST configs.

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
    """Return the ``TargetSettings`` of the command line, else of a config, else of the NEST configs.

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


def arguments(argv):
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", nargs="+", required=True, help="one or more NeMo manifests")
    parser.add_argument("--output", type=Path, required=True, help="the yaml file to write")
    parser.add_argument("--config", help="NeMo config whose model.preprocessor to use (default: that of NEST)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read audio (default: 0, this one)")
    _add_pca_arguments(parser)
    options = parser.parse_args(argv)
    if options.workers < 0:
        parser.error(f"--workers is {options.workers}; it must be 0 or more")
    unused = [name for name in PCA_OPTIONS if getattr(options, name) is not None] if options.pca is None else []
    if unused:
        parser.error(f"--{unused[0]} is of use only with --pca")
    if options.components is not None and options.components < 1:
        parser.error(f"--components is {options.components}; it must be 1 or more")
    check_folders(parser, options, "output", "pca")
    return options


def _add_pca_arguments(parser):
    """Add the options of the principal components."""
    parser.add_argument(
        "--pca", type=Path, help="the .npz file to write with the principal components of the quantizer's input"
    )
    parser.add_argument("--combine_time_steps", type=int, help="frames in a target (default: that of --config, or 8)")
    parser.add_argument(
        "--components", type=int, help=f"number of components to write (default: {DEFAULT_COMPONENTS})"
    )
    parser.add_argument(
        "--target_normalize",
        choices=TARGET_NORMALIZATIONS,
        help="how the quantizer's input is normalised (default: that of --config, or per_feature)",
    )


def main(argv=None):
    """Run the command line; return the exit status."""
    options = arguments(argv)
    try:
        preprocessor = read_preprocessor(options.config)
        settings = None
        if options.pca is not None:
            settings = read_target_settings(options.config, options.target_normalize, options.combine_time_steps)
        utterances = [entry for path in options.manifest for entry in audio_entries([], path, must_exist=True)]
        moments, scatter = corpus_statistics(utterances, preprocessor, settings, options.workers)
        statistics = moments.statistics()
        if options.pca is not None:
            number = DEFAULT_COMPONENTS if options.components is None else options.components
            share = write_projection(options.pca, scatter, settings, number)
        write_text(options.output, statistics_text(options, preprocessor, utterances, moments, statistics))
    except (ValueError, OSError) as error:
        return report_error(__file__, error)
    print(
        f"{options.output}: {len(statistics['fixed_mean'])} features over {moments.count} frames "
        f"({moments.seconds / 3600:.2f} h, {len(utterances)} utterances).\n"
        f"Use it with model.preprocessor.normalize={options.output} in pretrain.py; "
        "in any other NeMo config its two lists go under model.preprocessor.normalize."
    )
    if options.pca is not None:
        print(
            f"{options.pca}: {number} principal components with {share:.1%} of the variance, over {scatter.count} targets "
            f"of {settings.combine_time_steps} frames, target_normalize {settings.target_normalize}."
        )
        if scatter.short:
            short = f"one target ({settings.combine_time_steps} frames), which add nothing: {scatter.short}."
            print(f"Utterances shorter than {short}")
        print(f"Use them with model.quantizer.projection=pca model.quantizer.projection_file={options.pca}")
    return 0


def statistics_text(options, preprocessor, utterances, moments, statistics):
    """Return the two lists as yaml, below comments on where they come from."""
    kept = {key: value for key, value in preprocessor.items() if key not in NEUTRAL and key != "_target_"}
    notes = [
        "Mean and standard deviation per feature, for model.preprocessor.normalize.",
        f"manifests: {', '.join(Path(path).name for path in options.manifest)}",
        f"{len(utterances)} utterances, {moments.seconds / 3600:.4f} h, {moments.count} frames",
        f"preprocessor: {json.dumps(kept)}",
    ]
    lines = [f"# {note}" for note in notes]
    lines += [f"{key}: [{', '.join(map(repr, values))}]" for key, values in statistics.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
