# SPDX-License-Identifier: Apache-2.0
"""Training, validation and streams on the fake device: no mixed devices, no host-device synchronisation but the allowed."""

import pytest
from device.allowed_waits import ALLOWED, not_allowed
from device.reports import scenario_reports, traffic_of
from device.run_scenarios import SCENARIOS, precisions_of

pytestmark = pytest.mark.integration


CASES = [
    pytest.param(scenario, precision, id=f'{scenario}-{precision}')
    for scenario in SCENARIOS
    for precision in precisions_of(scenario)
]


@pytest.fixture(scope='module')
def fakegpu(tmp_path_factory):
    return scenario_reports(tmp_path_factory)


@pytest.mark.parametrize('scenario, precision', CASES)
def test_everything_runs_with_the_allowed_synchronisations_only(fakegpu, scenario, precision):
    report = fakegpu[scenario][precision]
    assert report['error'] is None, report['error']
    assert report['values']
    surplus = not_allowed(scenario, traffic_of(report))
    assert not surplus, '\n'.join([*surplus, 'tests/device/allowed_waits.py has what is allowed'])
    assert report['difference'] is None, f"the CPU computes something else: {report['difference']}"


def test_nothing_is_allowed_that_does_not_happen(fakegpu):
    idle = [
        entry
        for entry in ALLOWED
        if not any(
            entry.covers(scenario, meeting)
            for scenario, by_precision in fakegpu.items()
            for report in by_precision.values()
            for meeting, _ in traffic_of(report)
        )
    ]
    assert not idle
