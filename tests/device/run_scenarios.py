# SPDX-License-Identifier: Apache-2.0
"""Run all scenarios on the fake device and on the CPU, in a process of its own, and print the findings as JSON."""

import json
import traceback

import torch
from device import fake_device
from device.autocast_rules import register_autocast
from device.host_traffic import recorded
from device.model_scenarios import MODELS
from device.module_scenarios import MODULES
from device.place import Place, plain
from device.trainer_scenarios import TRAINER
from torch.utils._python_dispatch import _disable_current_modes

SCENARIOS = {**MODULES, **MODELS, **TRAINER}
TOLERANCE = dict(rtol=1e-3, atol=1e-4)


def precisions_of(scenario: str) -> tuple[str, ...]:
    """Return the precisions that a scenario runs in."""
    return ('float32', 'autocast bfloat16') if scenario in TRAINER else ('float32', 'float16', 'autocast bfloat16')


def run(scenario: str, place: Place) -> dict:
    """Run a scenario; returns the values that it computed, the traffic, and the error, if any."""
    torch.manual_seed(5)
    values, error = [], None
    with recorded() as traffic:
        try:
            values = SCENARIOS[scenario](place)
        except Exception as raised:
            error = f'{type(raised).__name__}: {raised}\n{traceback.format_exc(limit=-6)}'
    return dict(values=plain(values), traffic=traffic, error=error)


def difference_from_cpu(scenario: str, values: list) -> str | None:
    """Return in what the values of a device differ from the CPU's; None: in nothing."""
    with _disable_current_modes():  # which take half of the time
        expected = run(scenario, Place(torch.device('cpu')))
    if expected['error']:
        return f"on the CPU: {expected['error']}"
    try:
        torch.testing.assert_close(values, expected['values'], equal_nan=True, **TOLERANCE)
    except AssertionError as error:
        return str(error)
    return None


def report(scenario: str, precision: str, device: torch.device) -> dict:
    """Run a scenario in a precision on the device; returns what the tests look at, without tensors."""
    found = run(scenario, Place(device, precision))
    values, error = found['values'], found['error']
    compare = precision == 'float32' and not error
    return dict(
        error=error,
        traffic=[[*meeting, count] for meeting, count in sorted(found['traffic'].items())],
        difference=difference_from_cpu(scenario, values) if compare else None,
        values=len(values),
    )


def main() -> None:
    """Run all scenarios in every precision; or print why this torch has no fake device."""
    found = {'why_not': fake_device.why_not()}
    if found['why_not'] is None:
        device = fake_device.install()
        register_autocast()
        found = {name: {each: report(name, each, device) for each in precisions_of(name)} for name in SCENARIOS}
    print(json.dumps(found))


if __name__ == '__main__':
    main()
