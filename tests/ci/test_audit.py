# SPDX-License-Identifier: Apache-2.0
"""A known vulnerability fails the check, and a check that could not be made is never taken for a clean one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / '.ci/audit.py'
VULNERABLE = {
    'name': 'requests',
    'version': '2.19.0',
    'vulns': [{'id': 'PYSEC-2018-28', 'aliases': ['CVE-2018-18074'], 'fix_versions': ['2.20.0']}],
}
SOUND = {'name': 'tqdm', 'version': '4.67.0', 'vulns': []}
UNKNOWN = {'name': 'torch', 'skip_reason': 'Dependency not found on PyPI and could not be audited'}
FAKE = """
import json, os, sys
answer = os.environ['ANSWER']
print('a warning', file=sys.stderr)
if answer == 'unreachable':
    sys.exit('ConnectionError: the service cannot be found')
print(json.dumps({'dependencies': json.loads(answer)}))
"""


def audit(tmp_path, answer, allowed='{}'):
    """Run the check with a pip-audit that gives this answer."""
    (tmp_path / 'pip_audit.py').write_text(FAKE)
    (tmp_path / 'allowed.json').write_text(allowed)
    (tmp_path / 'pins.txt').write_text('requests==2.19.0\n')
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    command = [sys.executable, str(SCRIPT), 'pins.txt', '--allowed', 'allowed.json']
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path), 'ANSWER': answer}
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)


def test_a_known_vulnerability_fails(tmp_path):
    done = audit(tmp_path, [VULNERABLE, SOUND])
    assert done.returncode == 1
    assert 'requests 2.19.0: PYSEC-2018-28, mended in 2.20.0' in done.stdout
    assert '2 packages of pins.txt checked, 1 problems' in done.stdout


@pytest.mark.parametrize('name', ['PYSEC-2018-28', 'CVE-2018-18074'])
def test_an_allowed_one_is_shown_with_its_reason(tmp_path, name):
    done = audit(tmp_path, [VULNERABLE, SOUND], json.dumps({name: 'no URL comes from users'}))
    assert done.returncode == 0 and 'allowed: no URL comes from users' in done.stdout


def test_the_list_of_allowed_ones_stays_short(tmp_path):
    done = audit(tmp_path, [SOUND], json.dumps({'CVE-1': 'old'}))
    assert done.returncode == 1 and 'CVE-1 is allowed, but no longer found' in done.stdout
    assert audit(tmp_path, [SOUND, UNKNOWN], json.dumps({'CVE-1': 'old'})).returncode == 0  # who knows
    done = audit(tmp_path, [SOUND], json.dumps({'CVE-1': ' '}))
    assert done.returncode == 1 and 'CVE-1 has no reason' in done.stderr


@pytest.mark.parametrize('answer', ['unreachable', [UNKNOWN]])
def test_a_check_that_could_not_be_made_is_said_and_no_failure(tmp_path, answer):
    done = audit(tmp_path, answer)
    assert done.returncode == 0 and 'NOTHING WAS CHECKED' in done.stdout and ' 0 problems' not in done.stdout


def test_packages_that_could_not_be_checked_are_named(tmp_path):
    done = audit(tmp_path, [SOUND, UNKNOWN])
    assert done.returncode == 0 and '1 of 2 packages COULD NOT BE CHECKED: torch' in done.stdout
