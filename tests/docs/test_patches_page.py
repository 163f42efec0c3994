# SPDX-License-Identifier: Apache-2.0
"""The page's tables name every module of the patch set, in the table of its kind, and nothing that is not there."""

import re
from pathlib import Path

import pytest

from nemo_streaming_ssl.report import patched_modules

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / 'docs/patches.md').read_text()
KINDS = {'patched': 'what stock NeMo does', 'added': 'what it is'}  # of a module: the second heading of its table


def table(second_heading):
    """The cells of each row of the table with this second heading."""
    found = re.search(rf'^\|[^|]*\| {second_heading} \|.*\n\|[- |]+\n((?:\|.*\n)+)', PAGE, flags=re.MULTILINE)
    return [line.strip('|\n').split(' | ') for line in found[1].splitlines()]


def completed(cell, separator):
    """The names in code of a cell; a name without a separator lies beside the one before it."""
    names = re.findall(r'`([^`]+)`', cell)
    for index, name in enumerate(names[1:], start=1):
        if separator not in name:
            names[index] = names[index - 1].rpartition(separator)[0] + separator + name
    return names


def modules_named(kind):
    names = [name for row in table(KINDS[kind]) for name in completed(row[0], '.')]
    return [name if name.startswith('nemo.') else f'nemo.collections.asr.{name}' for name in names]


@pytest.mark.parametrize('kind', KINDS)
def test_the_modules_named_are_those_of_the_tree(kind):
    """Both ways: each is named, once, in the table of its kind, and what is named exists."""
    assert sorted(modules_named(kind)) == sorted(module.name for module in patched_modules() if module.kind == kind)


def test_the_tests_named_exist():
    named = {name: completed(tests, '/') for name, _, _, tests, _ in table(KINDS['patched'])}
    assert all(named.values())
    missing = {test for tests in named.values() for test in tests if not (ROOT / 'tests' / test).exists()}
    assert not missing


def test_the_pages_it_links_to_exist():
    pages = re.findall(r'\]\((\w+\.md)(?:#[\w-]+)?\)', PAGE)
    assert pages and all((ROOT / 'docs' / page).is_file() for page in pages)
