# SPDX-License-Identifier: Apache-2.0
"""Scripts that train on two ranks of this machine."""

import json
import socket
from pathlib import Path

from fresh_process import run_python


def address_of_ranks() -> dict[str, str]:
    """Return where ranks of this machine meet, as environment variables: at a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(probe.getsockname()[1]))


def run_on_two_ranks(script: Path, folder: Path, names=(0, 1)) -> list[dict]:
    """Run a script that starts its own ranks and writes what they found to FOLDER/NAME.json; return that."""
    done = run_python(script, folder, PYTHONPATH=str(Path(__file__).parent), **address_of_ranks())
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f'{name}.json').read_text()) for name in names]
