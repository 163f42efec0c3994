# SPDX-License-Identifier: Apache-2.0
"""The workflows run make targets, which run here as well."""

import re
import subprocess
from itertools import product
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / '.github/workflows').glob('*.yml'))
TARGETS = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), flags=re.MULTILINE)


def jobs_of(workflow):
    """The jobs of a workflow, by name."""
    return yaml.safe_load(workflow.read_text())['jobs']


def commands() -> list:
    """Each command of each workflow, with every value of its job's matrix."""
    found = []
    for workflow in WORKFLOWS:
        for name, job in jobs_of(workflow).items():
            matrix = job.get('strategy', {}).get('matrix', {})
            for step, values in product(job['steps'], product(*matrix.values())):
                command = step.get('run')
                for key, value in zip(matrix, values):
                    command = command and command.replace('${{ matrix.%s }}' % key, value)
                if command:
                    found.append(pytest.param(command, id=f'{workflow.stem}-{name}-{command}'))
    return found


@pytest.mark.parametrize('command', commands())
def test_a_step_is_a_make_target(command):
    make, target, *variables = command.split()
    assert make == 'make' and target in TARGETS and '$' not in command
    for variable in variables:
        name, value = variable.split('=')
        assert name in ('NEMO', 'TESTS') and (name == 'NEMO' or (ROOT / value).is_dir())
    done = subprocess.run(['make', '--dry-run', target, *variables], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_workflows_do_what_ci_does():
    asked = [command.values[0] for command in commands()]
    wanted = re.findall(r'^make .*', (ROOT / '.ci/run').read_text(), flags=re.MULTILINE)
    assert set(wanted) <= set(asked)
    assert {'make test NEMO=3.0.0 TESTS=tests/device', 'make gpu-check NEMO=3.0.0'} <= set(asked)


def test_a_gpu_is_asked_for_nightly_and_by_a_label():
    workflow = yaml.safe_load((ROOT / '.github/workflows/gpu.yml').read_text())
    on = workflow[True]  # YAML takes `on` for a truth value
    assert 'schedule' in on and on['pull_request']['types'] == ['labeled']
    (job,) = workflow['jobs'].values()
    assert 'self-hosted' in job['runs-on'] and "label.name == 'gpu'" in job['if']
