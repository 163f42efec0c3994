# SPDX-License-Identifier: Apache-2.0
"""Runs the scenarios in processes of their own, once in a test run, and reads what they found."""

import json
from pathlib import Path

import pytest
from device.host_traffic import Meeting
from fresh_process import run_python
from shared_results import shared_folder

SCRIPT = Path(__file__).with_name('run_scenarios.py')


def run_script(*arguments: str) -> dict:
    """Run ``run_scenarios.py``; returns what it prints."""
    done = run_python(SCRIPT, *arguments, PYTHONPATH=str(SCRIPT.parents[1]))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def scenario_reports(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return the reports of all scenarios by scenario and precision; skip where torch has no fake device."""
    folder = shared_folder(
        tmp_path_factory,
        'device_reports',
        lambda made: (made / 'reports.json').write_text(json.dumps(run_script())),
    )
    reports = json.loads((folder / 'reports.json').read_text())
    if 'why_not' in reports:
        pytest.skip(reports['why_not'])
    return reports


def traffic_of(report: dict) -> list[tuple[Meeting, int]]:
    """Return what a report says of waits and copies."""
    return [(Meeting(*meeting), times) for *meeting, times in report['traffic']]
