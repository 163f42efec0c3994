# SPDX-License-Identifier: Apache-2.0
"""docs/architecture.md names modules that exist, and its diagrams."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / 'docs'
PAGE = (DOCS / 'architecture.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('name', sorted(set(re.findall(r'`(nemo(?:\.[a-z_]+)+)`', PAGE))))
def test_a_module_exists(name):
    assert importlib.util.find_spec(name) is not None


def test_the_diagrams_are_there():
    pictures = re.findall(r'\((pictures/[^)]+)\)', PAGE)
    assert len(pictures) == 2
    assert all((DOCS / picture).is_file() for picture in pictures)
