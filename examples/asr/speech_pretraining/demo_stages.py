# SPDX-License-Identifier: Apache-2.0
"""What the parts of the demo share: running a script of this folder as a stage that ends in one file, and saying so.

A stage leaves its file whole or not at all, so the demo can be interrupted anywhere and started again.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def say(text: str) -> None:
    """Print a line that stands out between NeMo's."""
    print(f'== {text}', flush=True)


def run(script: str, *arguments, **streams) -> None:
    """Run a script of this folder in a fresh interpreter; if it fails, end this one with the same status.

    Args:
        script: file name of the script.
        arguments: the command line; anything that ``str`` turns into its words.
        streams: ``stdout`` and so on, as ``subprocess.run`` takes them.
    """
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    status = subprocess.run(command, check=False, **streams).returncode
    if status:
        raise SystemExit(status)


def train(script: str, config: str, overrides: list[str], log_dir: Path, model_file: Path) -> None:
    """Train by one of the training scripts, or go on where a run was; put its .nemo file in place when it is done.

    Args:
        script: file name of the script.
        config: name of its config.
        overrides: for Hydra.
        log_dir: of checkpoints and logs.
        model_file: where the model goes.

    Raises:
        SystemExit: with the script's status if it fails, or if it left no model.
    """
    run(script, '--config-name', config, f"+exp_manager.explicit_log_dir='{log_dir.resolve()}'", *overrides)
    saved = sorted((log_dir / 'checkpoints').glob('*.nemo'), key=os.path.getmtime)
    if not saved:
        raise SystemExit(f"pretrain_demo: the training left no .nemo file in {log_dir / 'checkpoints'}")
    os.replace(saved[-1], model_file)
