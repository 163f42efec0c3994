# SPDX-License-Identifier: Apache-2.0
"""Training, validation and streams on the fake device: no mixed devices, no host-device synchronisation but the allowed."""

import json
from pathlib import Path

import pytest
from device.allowed_waits import ALLOWED, not_allowed
from device.host_traffic import Meeting
from device.run_scenarios import SCENARIOS, precisions_of
from fresh_process import run_python
from shared_results import shared_folder

pytestmark = pytest.mark.integration
SCRIPT = Path(__file__).with_name('run_scenarios.py')
CASES = [(scenario, precision) for scenario in SCENARIOS for precision in precisions_of(scenario)]


@pytest.fixture(scope='module')
def fakegpu(tmp_path_factory):
    """The reports of all scenarios by scenario and precision, from a process of its own."""

    def make(folder):
        done = run_python(SCRIPT, PYTHONPATH=str(SCRIPT.parents[1]))
        assert done.returncode == 0, done.stderr[-4000:]
        (folder / 'reports.json').write_text(done.stdout.splitlines()[-1])

    reports = json.loads((shared_folder(tmp_path_factory, 'device_reports', make) / 'reports.json').read_text())
    if 'why_not' in reports:
        pytest.skip(reports['why_not'])
    return reports


def traffic_of(report):
    """The synchronisations and copies of a report: a list of pairs of ``Meeting`` and count."""
    return [(Meeting(*meeting), times) for *meeting, times in report['traffic']]


@pytest.mark.parametrize('scenario, precision', CASES)
def test_everything_runs_with_the_allowed_synchronisations_only(fakegpu, scenario, precision):
    report = fakegpu[scenario][precision]
    assert report['error'] is None, report['error']
    assert report['values']
    surplus = not_allowed(scenario, traffic_of(report))
    assert not surplus, '\n'.join([*surplus, 'tests/device/allowed_waits.py has what is allowed'])
    assert report['difference'] is None, f"the CPU computes something else: {report['difference']}"


def test_nothing_is_allowed_that_does_not_happen(fakegpu):
    seen = [
        (scenario, meeting)
        for scenario, by_precision in fakegpu.items()
        for report in by_precision.values()
        for meeting, _ in traffic_of(report)
    ]
    assert not [entry for entry in ALLOWED if not any(entry.covers(*each) for each in seen)]
