# SPDX-License-Identifier: Apache-2.0
"""The check of a GPU says so where there is none, and reports what passed and what failed where there is one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from load_script import load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / '.ci/gpu_check.py'
RESULTS = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_passes[cuda]"/>
<testcase classname="tests.a" name="test_needs_two_gpus"><skipped message="needs two GPUs"/></testcase>
{bad}</testsuite></testsuites>"""
BAD = '<testcase classname="tests.b" name="test_fails[cuda]"><failure>1 != 2</failure></testcase>'
WRITES_RESULTS = """
import sys
(path,) = [argument.removeprefix('--junitxml=') for argument in sys.argv if argument.startswith('--junitxml=')]
open(path, 'w').write(sys.argv[1])
"""


@pytest.fixture
def gpu_check():
    return load_script(SCRIPT)


def with_a_gpu(gpu_check, monkeypatch, bad=''):
    """Stand-ins for a GPU, its tests and its benchmarks."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index=0: 'Fake GPU')
    writes = '-c', WRITES_RESULTS, RESULTS.format(bad=bad)
    monkeypatch.setattr(gpu_check.tests, '__defaults__', (writes,))
    prints = '-c', "import sys; print('| stock / blocks | 2.0 |', *sys.argv[1:])"
    monkeypatch.setattr(gpu_check, 'BENCHMARKS', dict.fromkeys(gpu_check.BENCHMARKS, prints))


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_without_a_gpu_it_says_so_and_ends_with_1(tmp_path):
    command = [sys.executable, str(SCRIPT), '--output', str(tmp_path / 'report.md')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / 'report.md').exists()
    assert 'NOTHING WAS CHECKED' in done.stdout and 'finds no GPU here' in done.stdout


@pytest.mark.parametrize('bad', ['', BAD], ids=['all passed', 'one failed'])
def test_the_report_has_device_tests_and_ratios(gpu_check, monkeypatch, tmp_path, bad):
    with_a_gpu(gpu_check, monkeypatch, bad)
    status = gpu_check.main(['--quick', '--output', str(tmp_path / 'report.md')])
    report = (tmp_path / 'report.md').read_text()
    assert status == (1 if bad else 0)
    assert report.startswith('# GPU check: FAILED' if bad else '# GPU check: passed')
    assert '| device 0 | Fake GPU |' in report and f'| torch | {torch.__version__} |' in report
    assert '| passed | 1 |' in report and '| skipped | 1 |' in report
    assert ('- failed: `tests.b::test_fails[cuda]`' in report) == bool(bad)
    assert report.count('stock / blocks | 2.0') == 2 * len(gpu_check.BENCHMARKS)  # the command, and what it printed


def test_a_benchmark_that_fails_fails_the_check(gpu_check, monkeypatch, tmp_path):
    with_a_gpu(gpu_check, monkeypatch)
    monkeypatch.setitem(gpu_check.BENCHMARKS, 'Training step', ('-c', "import sys; sys.exit('out of memory')"))
    assert gpu_check.main(['--output', str(tmp_path / 'report.md')]) == 1
    report = (tmp_path / 'report.md').read_text()
    assert '## Training step: FAILED' in report and 'out of memory' in report
