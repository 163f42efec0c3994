# SPDX-License-Identifier: Apache-2.0
"""An import against the direction fails the check and is named, and so is a module that has no floor."""

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


def test_the_patch_set_keeps_the_contract():
    returncode, report = check(ROOT)
    assert returncode == 0, report
    assert ' 0 broken' in report


@pytest.mark.parametrize(
    ('file', 'line', 'named'),
    [
        (
            f'{ASR}/parts/att_context/windows.py',
            'from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel',
            'nemo.collections.asr.parts.att_context.windows -> nemo.collections.asr.models.ssl_models',
        ),
        (
            f'{ASR}/parts/att_context/windows.py',
            'def late():\n    from nemo.collections.asr.modules import rnnt  # which only NeMo has',
            'nemo.collections.asr.parts.att_context.windows -> nemo.collections.asr.modules.rnnt',
        ),
        (
            f'{ASR}/parts/att_context/context.py',
            'import lightning.pytorch as pl',
            'nemo.collections.asr.parts.att_context.context -> lightning',
        ),
        (
            f'{ASR}/parts/att_context/context.py',
            'from nemo.utils import logging',
            'nemo.collections.asr.parts.att_context.context -> nemo.utils',
        ),
        (
            f'{ASR}/parts/streaming/session.py',
            'from nemo.collections.asr.parts.ssl_reports import figures',
            'nemo.collections.asr.parts.streaming.session -> nemo.collections.asr.parts.ssl_reports.figures',
        ),
        (
            'src/nemo_streaming_ssl/versions.py',
            'from nemo.utils import logging',
            'nemo_streaming_ssl.versions -> nemo.utils',
        ),
    ],
    ids=['own module', "NeMo's module", 'Lightning', 'NeMo', 'sibling', 'overlay'],
)
def test_an_import_against_the_direction_is_named(tree, file, line, named):
    with (tree / file).open('a') as planted:
        planted.write(f'\n\n{line}\n')
    returncode, report = check(tree)
    assert returncode == 1
    assert named in report


@pytest.mark.parametrize('file', [f'{ASR}/parts/forgotten/thing.py', f'{ASR}/parts/utils/known_keys_too.py'])
def test_a_module_without_a_floor_is_named(tree, file):
    (tree / file).parent.mkdir(exist_ok=True)
    (tree / file).write_text('')
    returncode, report = check(tree)
    assert returncode == 1
    assert f'{file} is on no floor' in report and ' 0 broken' in report
