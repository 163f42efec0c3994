# SPDX-License-Identifier: Apache-2.0
"""A broken ``.nemo`` file is named and leaves nothing behind; a save that fails leaves the earlier file."""

import os
import pickle
import re
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from tiny_nest import tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.utils.app_state import AppState

CLASS = EncDecDenoiseMaskedTokenPredModel


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A model's ``.nemo`` file."""
    path = tmp_path_factory.mktemp('saved') / 'tiny.nemo'
    tiny_model().save_to(str(path))
    return path


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder that temporary files go to."""
    folder = tmp_path / 'temporary'
    folder.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    return folder


def member(path, name):
    with tarfile.open(path) as archive:
        return next(each for each in archive if each.name.endswith(name))


def broken(path, how):
    content = bytearray(path.read_bytes())
    weights = member(path, 'weights.ckpt')
    cuts = {
        'empty': 0,
        'half': len(content) // 2,
        'the end missing': weights.offset_data + weights.size - 100,
        'cut before the weights': weights.offset,
        'cut after their header': weights.offset_data,
    }
    if how == 'junk':
        return b'no archive at all ' * 1000
    if how in cuts:
        return bytes(content[: cuts[how]])
    middle = weights.offset_data + weights.size // 2
    for position in {'bits of the weights flipped': range(middle, middle + 64), 'a header': [weights.offset + 5]}[how]:
        content[position] ^= 255
    return bytes(content)


@pytest.mark.parametrize(
    'how',
    [
        *('empty', 'junk', 'half', 'the end missing', 'cut before the weights', 'cut after their header'),
        *('bits of the weights flipped', 'a header'),
    ],
)
def test_a_broken_file_is_named_and_leaves_nothing_behind(saved, tmp_path, temporary, how):
    path, folder = tmp_path / 'broken.nemo', os.getcwd()
    path.write_bytes(broken(saved, how))
    for read in (lambda: CLASS.restore_from(str(path), map_location='cpu'), lambda: extract(path, tmp_path / 'out')):
        with pytest.raises(ValueError, match=re.escape(f'{path} is truncated, corrupt or no .nemo file')):
            read()
        assert not AppState().is_model_being_restored and os.getcwd() == folder and not list(temporary.iterdir())


def extract(path, folder):
    return CLASS.extract_state_dict_from(str(path), str(folder))


def test_a_whole_file_loads_as_before(saved, tmp_path):
    restored, original = CLASS.restore_from(str(saved), map_location='cpu').state_dict(), tiny_model().state_dict()
    assert all(torch.equal(restored[name], weight) for name, weight in original.items())
    assert set(extract(saved, tmp_path)) == set(original)
    with pytest.raises(FileNotFoundError, match='none.nemo'):
        CLASS.restore_from(str(tmp_path / 'none.nemo'))


def test_a_failing_save_names_the_file_and_leaves_the_earlier_one(saved, tmp_path, monkeypatch):
    path = tmp_path / 'model.nemo'
    path.write_bytes(saved.read_bytes())
    write = tarfile.TarFile.addfile

    def full(self, tarinfo, fileobj=None):
        if tarinfo.name.endswith('weights.ckpt'):
            raise OSError(28, 'No space left on device')
        return write(self, tarinfo, fileobj)

    monkeypatch.setattr(tarfile.TarFile, 'addfile', full)
    with pytest.raises(OSError, match=re.escape(f'{path}: No space left on device')):
        tiny_model(seed=1).save_to(str(path))
    assert path.read_bytes() == saved.read_bytes() and list(tmp_path.iterdir()) == [path]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


LOAD = """
import sys
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
try:
    SaveRestoreConnector._load_state_dict_from_disk(sys.argv[1])
except Exception as error:
    print('refused:', type(error).__name__)
"""


@pytest.mark.integration
def test_a_payload_in_the_weights_is_refused_as_by_stock(saved, tmp_path):
    """No code in a ``.nemo`` file runs, patched or not, and both raise the same error."""
    path, weights = tmp_path / 'payload.nemo', tmp_path / 'parts' / 'model_weights.ckpt'
    with tarfile.open(saved) as archive:
        archive.extractall(weights.parent, filter='data')
    torch.save({'weight': Payload(tmp_path / 'ran')}, weights)
    with tarfile.open(path, 'w:') as archive:
        archive.add(weights.parent, arcname='.')
    with pytest.raises(pickle.UnpicklingError, match='payload.nemo.*Weights only load failed'):
        CLASS.restore_from(str(path), map_location='cpu')
    stock = run_python('-c', LOAD, weights, patched=False, cwd=tmp_path)
    assert 'refused: UnpicklingError' in stock.stdout, stock.stderr[-2000:]
    assert not (tmp_path / 'ran').exists()


def test_nothing_here_unpickles_or_evaluates():
    """No file of the patch set or the scripts calls what runs code from data."""
    root = Path(__file__).resolve().parents[3]
    files = [path for folder in ('nemo', 'src', 'examples') for path in (root / folder).rglob('*.py')]
    calls = re.compile(
        r'\bpickle\.loads?\(|\bUnpickler\(|(?<![.\w])(eval|exec)\(|weights_only\s*=\s*False|yaml\.load\('
        r'|torch\.load\((?!.*weights_only=True)'
    )
    assert not [f'{path}: {line}' for path in files for line in path.read_text().split('\n') if calls.search(line)]
