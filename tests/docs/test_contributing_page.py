# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING.md's layout table and its picture of the floors agree with the tree, and the rooms stay small."""

import re
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / 'CONTRIBUTING.md').read_text()
FILES = {file.relative_to(ROOT): len(file.read_text().splitlines()) for file in (ROOT / 'nemo').rglob('*.py')}
LARGEST_SHARE = 0.3
MOST_LINES = {
    'nemo/collections/asr/models/ssl_models.py': 500,
    'nemo/collections/asr/modules/conformer_encoder.py': 550,
}


def folders_of_layout():
    """The folders that the first column of the layout table names."""
    rows = re.search(r'^\| folder \|.*\n\|[- |]+\n((?:\|.*\n)+)', PAGE, flags=re.MULTILINE)[1].splitlines()
    return [folder.rstrip('/') for row in rows for folder in re.findall(r'`([^`]+)`', row.split(' | ')[0])]


def floors_of_contract():
    """The floors of the import contract, as the picture has them."""
    contract = ConfigParser()
    contract.read(ROOT / '.importlinter')
    layers = contract['importlinter:contract:floors']['layers'].split('\n')
    return [layer.replace('nemo.collections.asr.', '').replace('.', '/') for layer in layers if layer]


def test_every_folder_of_the_layout_is_there():
    missing = [folder for folder in folders_of_layout() if not (ROOT / folder).is_dir()]
    assert not missing


def test_every_folder_of_the_patch_set_is_in_the_layout():
    assert {file.parent.as_posix() for file in FILES} <= set(folders_of_layout())
    assert len(set(folders_of_layout())) == len(folders_of_layout())


def test_the_picture_has_the_floors_of_the_contract():
    (picture,) = re.findall(r'```text\n(.*?)```', PAGE, flags=re.DOTALL)
    assert [line.strip() for line in picture.splitlines() if line.strip() != 'v'] == floors_of_contract()


def test_no_folder_holds_most_of_the_patch_set():
    lines = Counter()
    for file, count in FILES.items():
        lines[file.parent.as_posix()] += count
    too_large = {folder: count for folder, count in lines.items() if count > LARGEST_SHARE * sum(FILES.values())}
    assert not too_large


@pytest.mark.parametrize('file, most', MOST_LINES.items())
def test_the_largest_files_stay_small(file, most):
    assert FILES[Path(file)] <= most
    assert f'`{Path(file).name}`' in PAGE
