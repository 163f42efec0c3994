# SPDX-License-Identifier: Apache-2.0
"""Run the tutorial, and write it with its outputs to where the site takes it from.

    python docs/run_tutorial.py [OUTPUT]

Its settings are environment variables, ``TUTORIAL_STEPS`` and others; its first cell has them.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NOTEBOOK = HERE.parent / 'tutorials/asr/Streaming_SSL_Pretraining.ipynb'
OUTPUT = HERE / 'tutorial.ipynb'
LONGEST_CELL = 1800  # seconds


def run(output: Path) -> None:
    """Run all cells, in this interpreter's environment and a folder that is removed afterwards.

    Raises:
        nbclient.exceptions.CellExecutionError: with the cell and its traceback, if one fails; nothing is written then.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        settings = {'TUTORIAL_FOLDER': str(Path(folder) / 'tutorial'), **os.environ}
        client = NotebookClient(
            notebook, timeout=LONGEST_CELL, kernel_name='python3', resources={'metadata': {'path': folder}}
        )
        client.execute(env=settings)
    partial = output.with_suffix('.partial')
    nbformat.write(notebook, partial)
    os.replace(partial, output)


if __name__ == '__main__':
    run(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else OUTPUT)
