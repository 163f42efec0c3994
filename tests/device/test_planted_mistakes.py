# SPDX-License-Identifier: Apache-2.0
"""Every planted mistake is found by the scenario that is there for it, and by what is meant to find it."""

import json
from pathlib import Path

import pytest
from device.planted_mistakes import MISTAKES
from fresh_process import run_python
from shared_results import shared_folder

pytestmark = pytest.mark.integration
SCRIPT = Path(__file__).with_name('planted_mistakes.py')
MIXED = ('default device', 'of the host')  # in the names of those that mix devices


def write_findings(folder):
    done = run_python(SCRIPT, PYTHONPATH=str(SCRIPT.parents[1]))
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / 'found.json').write_text(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def findings(tmp_path_factory):
    folder = shared_folder(tmp_path_factory, 'planted_mistakes', write_findings)
    found = json.loads((folder / 'found.json').read_text())
    if 'why_not' in found:
        pytest.skip(found['why_not'])
    return found


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_found(findings, mistake):
    first, *_ = findings[mistake] or ['nothing was found']
    if mistake.endswith(MIXED):
        assert first.startswith('MixedDevices')
    else:
        assert first.startswith(MISTAKES[mistake].scenario) and (' wait ' in first or ' copy to ' in first)
