# SPDX-License-Identifier: Apache-2.0
"""The tutorial has no outputs, and one that fails is not published; `make docs` runs it."""

from pathlib import Path

import nbformat
import pytest
from load_script import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tutorial():
    return load_script(ROOT / 'docs/run_tutorial.py')


def test_no_outputs_are_committed(tutorial):
    notebook = nbformat.read(tutorial.NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.integration
def test_a_cell_that_fails_writes_nothing(tutorial, tmp_path, monkeypatch):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('1 / 0')])
    nbformat.write(broken, tmp_path / 'broken.ipynb')
    monkeypatch.setattr(tutorial, 'NOTEBOOK', tmp_path / 'broken.ipynb')
    with pytest.raises(Exception, match='ZeroDivisionError'):
        tutorial.run(tmp_path / 'out.ipynb')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['broken.ipynb']
