# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_streaming_ssl``: ``examples TARGET`` and ``docs [PAGE]``, out of the installed package."""

import pytest

from nemo_streaming_ssl import PatchFinder
from nemo_streaming_ssl.__main__ import main
from nemo_streaming_ssl.deprecation import renamed
from nemo_streaming_ssl.documentation import pages

COPIED = ("asr/train.py", "asr/conf/tiny.yaml", "slurm/job.sbatch")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A patch set with examples, caches, and a file that is neither script nor config."""
    for name in (*COPIED, "asr/__pycache__/train.pyc", "asr/notes.txt"):
        path = tmp_path / "tree/examples" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.setattr(PatchFinder, "tree", str(tmp_path / "tree"))


def test_scripts_and_configs_are_copied(tree, tmp_path):
    assert main(["examples", str(tmp_path / "mine")]) == 0
    files = {str(path.relative_to(tmp_path / "mine")): path.read_text() for path in (tmp_path / "mine").rglob("*.*")}
    assert files == {name: name for name in COPIED}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "tree"]  # and nothing is left beside


@pytest.mark.parametrize("target", ["tree", "nowhere/mine"])
def test_a_target_that_exists_or_has_no_parent_is_named(tree, tmp_path, target, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["examples", str(tmp_path / target)]) == 1
    assert str(tmp_path / target) in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_all_pages_are_listed_with_their_titles(checkout, capsys):
    assert main(["docs"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    included = {"changelog", "contributing", "protocol"}  # pages of the site only
    assert set(listed) == {path.stem for path in (checkout / "docs").glob("*.md")} - included
    assert pages()["streaming"] == "Live streaming"


@pytest.mark.parametrize("name", ["contexts", "contexts.md", "docs/contexts.md#precedence"])
def test_a_page_is_printed_however_an_error_names_it(checkout, capsys, name):
    assert main(["docs", name]) == 0
    assert capsys.readouterr().out == (checkout / "docs/contexts.md").read_text(encoding="utf-8") + "\n"


def test_an_old_name_works_and_warns_with_the_new_one():
    def new_name(value, scale=1):
        return value * scale

    with pytest.warns(FutureWarning, match=r'old_name is now .*new_name'):
        assert renamed('old_name', new_name)(3, scale=2) == 6
