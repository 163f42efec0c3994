# SPDX-License-Identifier: Apache-2.0
"""All that trains, validates and streams, on a GPU that is not there: no mixed devices, and no wait but the known ones."""

import pytest
from device.allowed_waits import ALLOWED, not_allowed
from device.reports import reports_on, traffic_of
from device.run_scenarios import precisions_of, scenarios_of

pytestmark = pytest.mark.integration
HALF = {'float16': 'torch.float16', 'bfloat16': 'torch.bfloat16'}


def cases(device):
    """The scenarios of a device, in each precision."""
    return [
        pytest.param(scenario, precision, id=f'{scenario}-{precision}')
        for scenario in scenarios_of(device)
        for precision in precisions_of(scenario)
    ]


@pytest.fixture(scope='module')
def fakegpu(tmp_path_factory):
    return reports_on('fakegpu', tmp_path_factory)


@pytest.fixture(scope='module')
def cuda(tmp_path_factory):
    return reports_on('cuda', tmp_path_factory)


def check(scenario, report):
    """Fail if a scenario failed, computed nothing, or asked the host for more than is allowed."""
    assert report['error'] is None, report['error']
    assert report['values']
    surplus = not_allowed(scenario, traffic_of(report))
    assert not surplus, '\n'.join([*surplus, 'tests/device/allowed_waits.py has what is allowed'])


@pytest.mark.parametrize('scenario, precision', cases('fakegpu'))
def test_everything_runs_on_a_device_without_a_wait_that_is_not_known(fakegpu, scenario, precision):
    report = fakegpu[scenario][precision]
    check(scenario, report)
    assert report['difference'] is None, f"the CPU computes something else: {report['difference']}"


@pytest.mark.parametrize('scenario, precision', cases('cuda'))
def test_everything_runs_forward_on_a_device_called_cuda(cuda, scenario, precision):
    check(scenario, cuda[scenario][precision])


def test_the_precisions_are_those_asked_for(fakegpu):
    for scenario in ('masking', 'decoder', 'encoder, chunked, block by block'):
        for precision, dtype in HALF.items():
            assert dtype in fakegpu[scenario][precision]['dtypes']


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
