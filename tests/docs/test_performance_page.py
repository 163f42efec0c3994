# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md has the list of allowed waits and copies as the tests have it."""

from pathlib import Path

from device.allowed_waits import as_markdown

PAGE = Path(__file__).resolve().parents[2] / 'docs/performance.md'


def test_the_page_has_the_list_of_the_tests():
    assert as_markdown() in PAGE.read_text()
