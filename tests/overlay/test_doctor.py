# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_streaming_ssl doctor``: what is wrong is named, with what to do about it."""

import subprocess
from collections import namedtuple

import pytest
import soundfile
import torch

from nemo_streaming_ssl import doctor
from nemo_streaming_ssl.__main__ import main

Usage = namedtuple("Usage", "total used free")


def found(name):
    """The finding of one check, by its function."""
    return getattr(doctor, f"_{name}")()


@pytest.mark.integration
def test_a_sound_installation_trains_a_step(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines[:-1]) and lines[-1] == "All checks passed."
    assert "a pre-training step: one step on" in lines[-2] and "loss" in lines[-2]


def test_each_thing_that_is_wrong_is_said_with_its_remedy(monkeypatch, capsys):
    findings = [doctor.Finding("disk", False, "full", "Make room."), doctor.Finding("torch", True, "2.0")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "WRONG disk: full",
        "      Make room.",
        "ok    torch: 2.0",
        "1 to fix, see above.",
    ]


@pytest.mark.parametrize("version, ok", [("2.5.3", True), ("3.0.1", True), ("2.4.0", False), (None, False)])
def test_nemo_has_to_be_one_of_those_tested(monkeypatch, version, ok):
    monkeypatch.setattr(doctor, "nemo_version", lambda: version)
    finding = found("nemo")
    assert finding.ok is ok
    assert ok or 'pip install "nemo_toolkit[asr]>=2.5.3,<3.1"' in finding.remedy


def test_a_driver_that_torch_cannot_use_is_wrong_and_no_driver_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert found("cuda").ok
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    finding = found("cuda")
    assert not finding.ok and "13.0" in finding.remedy


def test_audio_that_cannot_be_read_is_wrong(monkeypatch):
    assert found("audio").ok

    def broken(*arguments, **options):
        raise RuntimeError("no decoder")

    monkeypatch.setattr(soundfile, "read", broken)
    finding = found("audio")
    assert not finding.ok and "no decoder" in finding.found and "libsndfile1" in finding.remedy


@pytest.mark.parametrize("error, said", [("no such config\nthe reason", "the reason"), ("", "exit status 3")])
def test_a_step_that_fails_is_told_by_its_last_line(monkeypatch, error, said):
    done = subprocess.CompletedProcess([], 3, stdout="", stderr=error)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *arguments, **options: done)
    finding = found("trial")
    assert not finding.ok and finding.found == said and doctor.TRIAL in finding.remedy
