# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Scripts that train on two ranks of this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def run_on_two_ranks(script: Path, folder: Path, names=(0, 1)) -> list[dict]:
    """Run a script that starts its own ranks and writes what they found to FOLDER/NAME.json; return that."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent), 'OMP_NUM_THREADS': '1'}
    environment.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f'{name}.json').read_text()) for name in names]
