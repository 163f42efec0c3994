# SPDX-License-Identifier: Apache-2.0
"""The check of the built site finds a public name without a place in it, and a broken link."""

import json
from pathlib import Path

import pytest
from load_script import load_script

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


@pytest.fixture(scope='module')
def check():
    return load_script(Path(__file__).resolve().parents[2] / '.ci/check_site.py')


def test_a_public_name_without_a_place_is_found(check, tmp_path):
    (tmp_path / 'tools.py').write_text(SOURCE)
    assert check.public_names(tmp_path / 'tools.py', 'a.tools') == ['a.tools.work', 'a.tools.Tool', 'a.tools.Tool.use']
    every = {name for module, path in check.modules().items() for name in check.public_names(path, module)}
    name = 'nemo.collections.asr.parts.streaming.session.StreamingSession.step'
    assert name in every and check.without_page(every) == [] and check.without_page(every - {name}) == [name]


def test_a_broken_link_is_not_one_that_cannot_be_reached(check):
    def line(status, info, uri='https://example.org'):
        return json.dumps({'filename': 'page.md', 'lineno': 3, 'status': status, 'uri': uri, 'info': info}) + '\n'

    unreached = line('broken', 'Max retries exceeded with url: / (NameResolutionError: Failed to resolve)')
    output = line('working', '') + unreached + line('broken', '404 Client Error', 'https://example.org/gone') + '\n'
    assert check.broken_links(output) == (['page.md:3: https://example.org/gone: 404 Client Error'], 1)
