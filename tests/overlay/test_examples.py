# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_streaming_ssl examples TARGET``: scripts and configs out of the installed package."""

import pytest

from nemo_streaming_ssl import PatchFinder
from nemo_streaming_ssl.examples import copy_examples


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A patch set with examples, caches, and a file that is neither script nor config."""
    folder = tmp_path / "tree" / "examples"
    for name in ("asr/train.py", "asr/conf/tiny.yaml", "asr/__pycache__/train.pyc", "asr/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    monkeypatch.setattr(PatchFinder, "tree", str(tmp_path / "tree"))
    return folder


def test_scripts_and_configs_are_copied(tree, tmp_path):
    assert copy_examples(tmp_path / "mine") == 2
    assert files_in(tmp_path / "mine") == ["asr/conf/tiny.yaml", "asr/train.py"]
    assert (tmp_path / "mine/asr/train.py").read_text() == "asr/train.py"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "tree"]  # and nothing is left beside


def test_what_is_there_is_not_touched(tree, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine is there already"):
        copy_examples(tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())


def test_a_missing_parent_is_named(tree, tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*nowhere to make it in"):
        copy_examples(tmp_path / "nowhere" / "mine")
