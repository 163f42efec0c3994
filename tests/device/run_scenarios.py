# SPDX-License-Identifier: Apache-2.0
"""Run scenarios on the fake device and on the CPU, in a process of its own, and print the findings as JSON.

python run_scenarios.py SCENARIO ...
"""

import json
import sys
import traceback

import torch
from device import fake_device
from device.autocast_rules import register_autocast
from device.host_traffic import recorded
from device.model_scenarios import MODELS
from device.module_scenarios import MODULES
from device.place import Place, plain
from device.trainer_scenarios import TRAINER

GROUPS = {'modules': MODULES, 'models': MODELS, 'trainer': TRAINER}
SCENARIOS = {name: scenario for group in GROUPS.values() for name, scenario in group.items()}
WHOLE, AUTOCAST = ('float32', 'float16', 'bfloat16'), ('autocast float16', 'autocast bfloat16')
OF_THE_TRAINER = ('float32', 'autocast bfloat16')  # Lightning's own plugin casts: one of them will do
SEED = 5
TOLERANCE = dict(rtol=1e-3, atol=1e-4)


def run(scenario: str, place: Place) -> dict:
    """Run a scenario; returns what it computed, the traffic, and the error, if any."""
    torch.manual_seed(SEED)
    values, error = [], None
    with recorded() as traffic:
        try:
            values = SCENARIOS[scenario](place)
        except Exception as raised:
            error = f'{type(raised).__name__}: {raised}\n{traceback.format_exc(limit=-6)}'
    return dict(values=plain(values), traffic=traffic, error=error)


def compared(scenario: str, found: dict) -> str | None:
    """Tell in what a device's results differ from the CPU's; None: in nothing."""
    expected = run(scenario, Place(torch.device('cpu')))
    if expected['error']:
        return f"on the CPU: {expected['error']}"
    try:
        torch.testing.assert_close(found['values'], expected['values'], equal_nan=True, **TOLERANCE)
    except AssertionError as error:
        return str(error)
    return None


def precisions_of(scenario: str) -> tuple[str, ...]:
    """Return the precisions that a scenario runs in."""
    return OF_THE_TRAINER if scenario in TRAINER else WHOLE + AUTOCAST


def report(scenario: str, precision: str, device: torch.device) -> dict:
    """Run a scenario in a precision on the device; what the tests look at, without tensors."""
    found = run(scenario, Place(device, precision))
    compare = precision == 'float32' and not found['error']
    difference = compared(scenario, found) if compare else None
    traffic = [[*meeting, count] for meeting, count in sorted(found['traffic'].items())]
    return dict(
        error=found['error'],
        traffic=traffic,
        difference=difference,
        values=len(found['values']),
    )


def main(*scenarios: str) -> None:
    """Run scenarios, all of them if none is named, in every precision."""
    reason = fake_device.why_not()
    if reason is not None:
        print(json.dumps({'why_not': reason}))
        return
    device = fake_device.install()
    register_autocast()
    found = {
        scenario: {precision: report(scenario, precision, device) for precision in precisions_of(scenario)}
        for scenario in scenarios or SCENARIOS
    }
    print(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
