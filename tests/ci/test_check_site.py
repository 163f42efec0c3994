# SPDX-License-Identifier: Apache-2.0
"""The check of the built site finds a public name without a place in it, and a link that leads nowhere."""

import json
from pathlib import Path

import pytest
from load_script import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def check():
    return load_script(ROOT / '.ci/check_site.py')


SOURCE = """
_private = 1
def work(): pass
def _help(): pass
class Tool:
    def use(self):
        def inner(): pass
    def _hold(self): pass
class _Box:
    def open(self): pass
"""


def test_public_names_are_those_without_an_underscore(check, tmp_path):
    (tmp_path / 'tools.py').write_text(SOURCE)
    assert check.public_names(tmp_path / 'tools.py', 'a.tools') == ['a.tools.work', 'a.tools.Tool', 'a.tools.Tool.use']


def test_a_name_without_a_place_is_found(check):
    every = {name for module, path in check.modules().items() for name in check.public_names(path, module)}
    assert check.without_page(every) == []
    name = 'nemo.collections.asr.parts.streaming.session.StreamingSession.step'
    assert name in every and check.without_page(every - {name}) == [name]


def link(status, info, uri='https://example.org'):
    return json.dumps({'filename': 'page.md', 'lineno': 3, 'status': status, 'uri': uri, 'info': info}) + '\n'


def test_broken_links_are_told_from_those_that_cannot_be_asked_for(check):
    unreached = link('broken', 'Max retries exceeded with url: / (NameResolutionError: Failed to resolve)')
    output = link('working', '') + unreached + link('broken', '404 Client Error', 'https://example.org/gone') + '\n'
    assert check.broken_links(output) == (['page.md:3: https://example.org/gone: 404 Client Error'], 1)
    assert check.broken_links('') == ([], 0)
