# SPDX-License-Identifier: Apache-2.0
"""The check names an import against the direction, and a module that has no layer."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASR = 'nemo/collections/asr'


@pytest.mark.integration
def test_imports_against_the_direction_and_a_module_without_a_layer_are_named(tmp_path):
    """Each contract is broken once, one of them by NeMo's own module in a function."""
    for folder in ('nemo', 'src'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / '.importlinter', tmp_path)
    planted = {
        f'{ASR}/parts/att_context/windows.py': 'def late():\n    from nemo.collections.asr.modules import rnnt',
        f'{ASR}/parts/att_context/context.py': 'import lightning.pytorch as pl',
        f'{ASR}/parts/streaming/session.py': 'from nemo.collections.asr.parts.ssl_reports import figures',
        'src/nemo_streaming_ssl/versions.py': 'from nemo.utils import logging',
        f'{ASR}/parts/forgotten/thing.py': '',
    }
    for file, line in planted.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        with (tmp_path / file).open('a') as source:
            source.write(f'\n\n{line}\n')
    command = [sys.executable, str(ROOT / '.ci/import_contract.py'), '--tree', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    report = ' '.join((done.stdout + done.stderr).split())  # lines break as wide as the terminal is
    assert done.returncode == 1
    for found in (
        'nemo.collections.asr.parts.att_context.windows -> nemo.collections.asr.modules.rnnt',
        'nemo.collections.asr.parts.att_context.context -> lightning',
        'nemo.collections.asr.parts.streaming.session -> nemo.collections.asr.parts.ssl_reports.figures',
        'nemo_streaming_ssl.versions -> nemo.utils',
        f'{ASR}/parts/forgotten/thing.py is in no layer',
    ):
        assert found in report
