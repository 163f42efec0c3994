# SPDX-License-Identifier: Apache-2.0
"""The pins are complete, agree with each other, and are what is installed."""

import os
import re
from importlib import metadata
from pathlib import Path

import pytest

from nemo_streaming_ssl.versions import in_tested_range, nemo_version

ROOT = Path(__file__).resolve().parents[2]
TESTED = sorted(path.stem.partition("-")[2] for path in ROOT.glob("requirements/constraints-*.txt"))
PIN = re.compile(r"([a-z0-9-]+)==([A-Za-z0-9.+]+)")


def pins(checkout, version):
    lines = _lines(checkout / "requirements" / f"constraints-{version}.txt")
    return {PIN.fullmatch(line)[1]: PIN.fullmatch(line)[2] for line in lines}


def _lines(file):
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("version", TESTED)
def test_constraints_pin_the_tests_and_one_nemo(checkout, version):
    pinned = pins(checkout, version)
    assert pinned["nemo-toolkit"] == version and in_tested_range(version)
    assert list(pinned) == sorted(pinned)
    assert set(_lines(checkout / "requirements" / "test.txt")) <= set(pinned)


@pytest.mark.integration
@pytest.mark.skipif(not os.environ.get("CI"), reason="an environment made by hand may hold more than the pins")
def test_installed_packages_are_the_pinned_ones(checkout):
    pinned = pins(checkout, nemo_version())
    installed = {
        re.sub(r"[-_.]+", "-", distribution.name).lower(): distribution.version.split("+")[0]
        for distribution in metadata.distributions()
    }
    own = {"pip", "nemo-streaming-ssl"}
    assert {name: version for name, version in installed.items() if name not in own} == pinned
