# SPDX-License-Identifier: Apache-2.0
"""A known vulnerability fails the check; a check that could not be made is reported as such."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / '.ci/audit.py'
VULNERABLE = {'name': 'requests', 'version': '2.19.0'}
VULNERABLE['vulns'] = [{'id': 'PYSEC-2018-28', 'aliases': ['CVE-2018-18074'], 'fix_versions': ['2.20.0']}]
VALID = {'name': 'tqdm', 'version': '4.67.0', 'vulns': []}
UNKNOWN = {'name': 'torch', 'skip_reason': 'Dependency not found on PyPI and could not be audited'}
FAKE = """
import json, os, sys
dependencies = json.loads(os.environ['ANSWER'])
if dependencies is None:
    sys.exit('ConnectionError: the service cannot be found')
print(json.dumps({'dependencies': dependencies}))
"""


@pytest.mark.parametrize(
    'answer, allowed, status, message',
    [
        ([VULNERABLE, VALID], {}, 1, 'requests 2.19.0: PYSEC-2018-28'),
        ([VULNERABLE, VALID], {'PYSEC-2018-28': 'no URL comes from users'}, 0, 'no URL comes from users'),
        ([VULNERABLE, VALID], {'CVE-2018-18074': 'no URL comes from users'}, 0, 'no URL comes from users'),
        ([VALID], {'CVE-1': 'old'}, 1, 'CVE-1 is allowed, but no longer found'),
        ([VALID], {'CVE-1': ' '}, 1, 'CVE-1 has no reason'),
        ([VALID, UNKNOWN], {'CVE-1': 'old'}, 0, '1 of 2 packages COULD NOT BE CHECKED: torch'),
        ([UNKNOWN], {}, 0, 'NOTHING WAS CHECKED'),
        (None, {}, 0, 'NOTHING WAS CHECKED'),
    ],
)
def test_the_verdict(tmp_path, answer, allowed, status, message):
    (tmp_path / 'pip_audit.py').write_text(FAKE)
    (tmp_path / 'allowed.json').write_text(json.dumps(allowed))
    (tmp_path / 'pins.txt').write_text('requests==2.19.0\n')
    command = [sys.executable, str(SCRIPT), 'pins.txt', '--allowed', 'allowed.json']
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path), 'ANSWER': json.dumps(answer)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == status and message in done.stdout + done.stderr
