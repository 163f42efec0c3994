# SPDX-License-Identifier: Apache-2.0
"""An import against the direction fails the check and is named, and so is a module that has no layer."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASR = 'nemo/collections/asr'


def check(tree):
    """Run the check on a tree; its report has the lines' breaks taken out, which depend on the terminal."""
    command = [sys.executable, str(ROOT / '.ci/import_contract.py'), '--tree', str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, ' '.join((done.stdout + done.stderr).split())


@pytest.fixture
def tree(tmp_path):
    """A copy of what the check reads, to plant in."""
    for folder in ('nemo', 'src'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / '.importlinter', tmp_path)
    return tmp_path


def test_imports_against_the_direction_are_named(tree):
    """Each contract is broken once, one of them by NeMo's own module in a function."""
    planted = {
        f'{ASR}/parts/att_context/windows.py': 'def late():\n    from nemo.collections.asr.modules import rnnt',
        f'{ASR}/parts/att_context/context.py': 'import lightning.pytorch as pl',
        f'{ASR}/parts/streaming/session.py': 'from nemo.collections.asr.parts.ssl_reports import figures',
        'src/nemo_streaming_ssl/versions.py': 'from nemo.utils import logging',
    }
    for file, line in planted.items():
        with (tree / file).open('a') as source:
            source.write(f'\n\n{line}\n')
    returncode, report = check(tree)
    assert returncode == 1
    for chain in (
        'nemo.collections.asr.parts.att_context.windows -> nemo.collections.asr.modules.rnnt',
        'nemo.collections.asr.parts.att_context.context -> lightning',
        'nemo.collections.asr.parts.streaming.session -> nemo.collections.asr.parts.ssl_reports.figures',
        'nemo_streaming_ssl.versions -> nemo.utils',
    ):
        assert chain in report


def test_a_module_without_a_layer_is_named(tree):
    file = f'{ASR}/parts/forgotten/thing.py'
    (tree / file).parent.mkdir(exist_ok=True)
    (tree / file).write_text('')
    returncode, report = check(tree)
    assert returncode == 1
    assert f'{file} is in no layer' in report and ' 0 broken' in report
