# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_streaming_ssl doctor`` names what is wrong, with what to do about it."""

import subprocess

import pytest
import torch
from fresh_process import run_python

from nemo_streaming_ssl import doctor
from nemo_streaming_ssl.__main__ import main


@pytest.fixture
def run(capsys):
    """Return a function that runs the doctor; it gives the exit status and the lines, without those of the trial."""

    def run():
        return main(["doctor"]), capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def without_trial(monkeypatch):
    """The trial step takes longest: let it succeed."""
    done = subprocess.CompletedProcess([], 0, stdout="one step", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *arguments, **options: done)


@pytest.mark.integration
def test_a_valid_installation_trains_a_step(run, monkeypatch):
    monkeypatch.setattr(doctor.subprocess, "run", lambda command, **options: run_python(*command[1:]))
    status, lines = run()
    assert status == 0 and all(line.startswith("ok ") for line in lines[:-1])
    assert "a pre-training step: one step on" in lines[-2] and "loss" in lines[-2]


@pytest.mark.parametrize("version, ok", [("2.5.3", True), ("3.0.1", True), ("2.4.0", False), (None, False)])
def test_nemo_has_to_be_one_of_those_tested(run, without_trial, monkeypatch, version, ok):
    monkeypatch.setattr(doctor, "nemo_version", lambda: version)
    status, lines = run()
    assert status == (0 if ok else 1)
    assert ok or any('pip install "nemo_toolkit[asr]>=2.5.3,<3.1"' in line for line in lines)


@pytest.mark.parametrize("driver, status", [(None, 0), ("/usr/bin/nvidia-smi", 1)])
def test_a_driver_that_torch_cannot_use_is_wrong(run, without_trial, monkeypatch, driver, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)
    found, lines = run()
    (index,) = [index for index, line in enumerate(lines) if " CUDA: " in line]
    assert found == status and ("13.0" in lines[index + 1]) == bool(status)


@pytest.mark.parametrize("error, found", [("no such config\nthe reason", "the reason"), ("", "exit status 3")])
def test_a_step_that_fails_is_reported_by_its_last_line(run, monkeypatch, error, found):
    done = subprocess.CompletedProcess([], 3, stdout="", stderr=error)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *arguments, **options: done)
    status, lines = run()
    assert status == 1 and lines[-3] == f"WRONG a pre-training step: {found}" and doctor.TRIAL in lines[-2]
