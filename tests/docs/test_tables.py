# SPDX-License-Identifier: Apache-2.0
"""Tables of measurements are those that benchmarks print, and a command puts them into their page."""

import re
import sys
from pathlib import Path

import pytest
from load_script import load_script

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path.read_text(encoding='utf-8') for path in (ROOT / 'docs').glob('*.md')}
# Benchmarks whose tables are in a page, which they write.
WRITTEN = {
    'data_loading': 'scale.md',
    'manifest': 'scale.md',
    'masking_audit': 'contexts.md',
    'objective_step': 'objectives.md',
    'training_step': 'performance.md',
    'two_processes': 'scale.md',
}


@pytest.fixture(scope='module')
def write():
    return load_script(ROOT / 'docs/write_tables.py')


PAGE = """# Page

| a | b |
| --- | ---: |
| 1 | 2 |
| 3 | 4 |

| other | table |
| --- | --- |
| stays | so |
"""
PRINTED = "some words\n| a | b |\n| --- | ---: |\n| 5 | 6 |\n3 done\n"


def test_a_table_takes_the_place_of_the_one_with_its_head(write):
    text, count = write.with_tables(PAGE, PRINTED)
    assert count == 1 and text == PAGE.replace('| 1 | 2 |\n| 3 | 4 |', '| 5 | 6 |')
    assert write.with_tables(text, PRINTED) == (text, 1)
    assert write.with_tables(PAGE, 'no table') == (PAGE, 0)


def test_of_several_with_the_same_head_the_one_with_the_same_rows_is_meant(write):
    second = '| a | b |\n| --- | ---: |\n| 7 | 8 |\n| 9 | 0 |\n'
    printed = '| a | b |\n| --- | ---: |\n| 9 | 1 |\n| 7 | 2 |\n'
    text, count = write.with_tables(PAGE + second, printed)
    assert count == 1 and text == PAGE + printed


def test_a_command_writes_its_page(write, tmp_path, capfd):
    page = tmp_path / 'page.md'
    page.write_text(PAGE)
    assert write.main(str(page), sys.executable, '-c', f'print({PRINTED!r})') == 0
    assert '| 5 | 6 |' in page.read_text() and '| stays | so |' in page.read_text()
    assert 'some words' in capfd.readouterr().out
    assert write.main(str(page), sys.executable, '-c', 'print(1)') == 1
    with pytest.raises(Exception, match='exit status 3'):
        write.main(str(page), sys.executable, '-c', f'print({PRINTED!r}); raise SystemExit(3)')
    assert [path.name for path in tmp_path.iterdir()] == ['page.md']


@pytest.mark.parametrize('name', WRITTEN)
def test_the_tables_of_a_page_have_the_heads_that_the_benchmark_prints(write, name):
    source = (ROOT / f'benchmarks/{name}.py').read_text(encoding='utf-8')
    heads = [line for line in re.findall(r"'(\|[^'\\\n]+\|)", source) if '{' not in line and '---' not in line]
    assert heads and set(heads) <= {table[0] for table in write.tables_in(PAGES[WRITTEN[name]])}, heads
    assert f'benchmarks/{name}.py' in PAGES[WRITTEN[name]]
