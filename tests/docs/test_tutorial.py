# SPDX-License-Identifier: Apache-2.0
"""The tutorial runs from its first cell to its last, in small."""

import json
from pathlib import Path

import nbformat
import pytest
from load_script import load_script

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / 'tutorials/asr/Streaming_SSL_Pretraining.ipynb'


@pytest.fixture
def run_tutorial():
    return load_script(ROOT / 'docs/run_tutorial.py').run


def test_no_outputs_are_committed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.integration
def test_every_cell_runs(run_tutorial, speech_corpus, tmp_path, monkeypatch):
    for name, value in {
        'STEPS': 8,
        'TUNING_STEPS': 2,
        'FOLDER': tmp_path / 'work',
        'TRAIN': speech_corpus / 'train_manifest.json',
        'VALIDATION': speech_corpus / 'validation_manifest.json',
    }.items():
        monkeypatch.setenv(f'TUTORIAL_{name}', str(value))
    run_tutorial(tmp_path / 'tutorial.ipynb')
    cells = json.loads((tmp_path / 'tutorial.ipynb').read_text())['cells']
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    assert not [output for output in outputs if output['output_type'] == 'error']
    assert [output for output in outputs if 'image/png' in output.get('data', {})]
    assert (tmp_path / 'work/recogniser.nemo').is_file()


def test_a_cell_that_fails_writes_nothing(run_tutorial, tmp_path, monkeypatch):
    module = run_tutorial.__globals__
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('1 / 0')])
    nbformat.write(broken, tmp_path / 'broken.ipynb')
    monkeypatch.setitem(module, 'NOTEBOOK', tmp_path / 'broken.ipynb')
    with pytest.raises(Exception, match='ZeroDivisionError'):
        run_tutorial(tmp_path / 'out.ipynb')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['broken.ipynb']
