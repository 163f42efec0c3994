# SPDX-License-Identifier: Apache-2.0
"""Functions that several scripts use: checks, errors, files, audio, models and training.

No script imports another script. What two of them need is here or in the package.
This module imports NeMo inside its functions only, because a script imports it before it checks the patches.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path


def require_patches(script: str) -> list[str]:
    """End the script with a clear error if the patches of this project are not in use.

    A script calls it before it imports NeMo: on stock NeMo an import would fail without the reason.

    Args:
        script: the ``__file__`` of the script.

    Returns:
        The lines of the report on the patches, for a log.

    Raises:
        SystemExit: with the reason, if the patches are not in use.
    """
    try:
        from nemo_streaming_ssl.report import require_active

        return require_active()
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f'{name_of(script)} needs the patches of nemo-streaming-ssl: {error}') from error


def show_help(text: str) -> None:
    """Print the help of a script with a config, and end it, if the command line has --help.

    Hydra's own help is the whole config. A script calls this before it imports NeMo, which takes longest.

    Args:
        text: the ``__doc__`` of the script.
    """
    if {'-h', '--help'} & set(sys.argv[1:]):
        print(text.strip())
        print(
            '\nEvery key of the config is an option, KEY=VALUE. --cfg job prints the config, --hydra-help what else Hydra takes.'
        )
        raise SystemExit(0)


def name_of(script: str) -> str:
    """Return the name that messages have for a script, given its ``__file__``."""
    return Path(script).stem


def report_error(script: str, error: Exception) -> int:
    """Print the name of the script, the error, and the page about its config key; return the exit status."""
    from nemo.collections.asr.parts.utils.config_keys import where_to_read

    print(f'{name_of(script)}: error: {error}{where_to_read(str(error))}', file=sys.stderr)
    return 2


def check_folders(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """End with the parser's error if the folder of an output file does not exist.

    Args:
        parser: made the options.
        options: the parsed command line.
        names: of options that hold the ``Path`` of a file to write, or None.
    """
    for name in names:
        path = getattr(options, name)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f'--{name} {path}: there is no folder {path.resolve().parent}')


def stream_parser(description: str, output: str) -> argparse.ArgumentParser:
    """Return a parser with the options of scripts that stream audio; ``output`` is --output's help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path, required=True, help='a .nemo file')
    parser.add_argument('audio', type=Path, nargs='*', help='audio files')
    parser.add_argument('--manifest', type=Path, help='a NeMo manifest, in place of audio files')
    parser.add_argument('--output', type=Path, help=output)
    parser.add_argument('--step-seconds', type=float, default=0.08, help='audio in each step (0.08)')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (cpu)')
    return parser


def parse_stream_options(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line of :func:`stream_parser`; an unusable option is the parser's error."""
    options = parser.parse_args(argv)
    if bool(options.audio) == (options.manifest is not None):
        parser.error('give audio files or --manifest')
    if not 0 < options.step_seconds < float('inf'):
        parser.error(f'--step-seconds is {options.step_seconds}; it must be above 0')
    check_folders(parser, options, 'output')
    return options


def restore(path: Path, device: str):
    """Restore a model from a .nemo file, in eval mode.

    Raises:
        ValueError: naming the file, if that fails.
    """
    import torch

    from nemo.core.classes.modelPT import ModelPT
    from nemo.utils import logging

    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f'--model {path}: there is no such file')
    logging.setLevel(logging.ERROR)  # NeMo warns that there is no training data
    try:
        model = ModelPT.restore_from(str(path), map_location=torch.device(device))
    except Exception as error:  # whatever tarfile, yaml, OmegaConf, torch and the model's class raise
        raise ValueError(f'--model {path}: NeMo cannot restore it: {error!r}') from error
    return model.eval()


def context_option(text: str):
    """Return what a context on the command line stands for: ``[40,0]``, a number, or the name of a preset."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def sample_rate_of(model) -> int:
    """Return the sampling rate of a model's audio, in Hz."""
    return model.preprocessor.featurizer.sample_rate


def make_trainer(cfg, *callbacks):
    """Make the trainer of a config, with its curriculum if it has one, and the folder of the experiment."""
    import lightning.pytorch as pl

    from nemo.collections.asr.parts.att_context.curriculum import AttContextCurriculum
    from nemo.utils.exp_manager import exp_manager
    from nemo.utils.trainer_utils import resolve_trainer_cfg

    curriculum = [AttContextCurriculum(**cfg.curriculum)] if cfg.get('curriculum') else []
    trainer = pl.Trainer(**resolve_trainer_cfg(cfg.trainer), callbacks=[*callbacks, *curriculum])
    exp_manager(trainer, cfg.get('exp_manager'))
    return trainer


def fit_or_exit(script: str, patches: list[str], cfg, prepare: Callable, build: Callable) -> None:
    """Train by the config; if it cannot work, end with one message before any training.

    Args:
        script: the ``__file__`` of the script.
        patches: what :func:`require_patches` returned, for the log.
        cfg: the config that Hydra composed.
        prepare: takes the config and returns it checked and completed.
        build: takes the prepared config and returns the trainer and the model.

    Raises:
        SystemExit: with status 2, after the message of a ValueError, an OSError or a class that Hydra cannot make.
    """
    import lightning.pytorch as pl
    from hydra.errors import InstantiationException
    from omegaconf import OmegaConf

    from nemo.utils import logging

    logging.info('\n'.join(patches))
    try:
        cfg = prepare(cfg)
        logging.info(f'Hydra config:\n{OmegaConf.to_yaml(cfg)}')
        if cfg.get('seed') is not None:
            pl.seed_everything(cfg.seed, workers=True)
        trainer, model = build(cfg)
    except (ValueError, OSError, InstantiationException) as error:
        raise SystemExit(report_error(script, error)) from error
    trainer.fit(model)
