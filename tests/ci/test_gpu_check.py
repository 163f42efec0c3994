# SPDX-License-Identifier: Apache-2.0
"""The check of a GPU reports that there is none, or what passed and what failed."""

from pathlib import Path

import pytest
import torch
from load_script import load_script

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
TIMES, FAILS = "print('| stock / blocks | 2.0 |')", "import sys; sys.exit('out of memory')"


@pytest.fixture
def gpu_check():
    return load_script(Path(__file__).resolve().parents[2] / '.ci/gpu_check.py')


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_without_a_gpu_nothing_is_checked(gpu_check, tmp_path, capsys):
    assert gpu_check.main(['--output', str(tmp_path / 'report.md')]) == 1
    assert 'NOTHING WAS CHECKED' in capsys.readouterr().out and not (tmp_path / 'report.md').exists()


@pytest.mark.parametrize('bad, benchmark, passed', [('', TIMES, True), (BAD, TIMES, False), ('', FAILS, False)])
def test_the_report_has_device_tests_and_benchmarks(gpu_check, monkeypatch, tmp_path, bad, benchmark, passed):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index=0: 'Fake GPU')
    monkeypatch.setattr(gpu_check.tests, '__defaults__', (('-c', WRITES_RESULTS, RESULTS.format(bad=bad)),))
    monkeypatch.setattr(gpu_check, 'BENCHMARKS', {'Training step': ('-c', benchmark)})
    assert gpu_check.main(['--quick', '--output', str(tmp_path / 'report.md')]) == (0 if passed else 1)
    report = (tmp_path / 'report.md').read_text()
    assert report.startswith('# GPU check: passed' if passed else '# GPU check: FAILED')
    assert '| device 0 | Fake GPU |' in report and '| passed | 1 |' in report and '| skipped | 1 |' in report
    assert ('- failed: `tests.b::test_fails[cuda]`' in report) == bool(bad)
    assert ('## Training step: FAILED' in report and 'out of memory' in report) == (benchmark == FAILS)
