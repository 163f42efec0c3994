# SPDX-License-Identifier: Apache-2.0
"""What is released: an sdist, and the wheel made of nothing but it."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({folder!r}))"
SPAWNED = """
import multiprocessing
import os
import sys
from importlib import import_module
from importlib.util import find_spec

from nemo_streaming_ssl.report import patched_modules, require_active


def files(_):
    names = [module.name for module in patched_modules()]
    if find_spec("nemo.collections.asr.inference") is None:  # NeMo before 3.0.0
        names = [name for name in names if ".asr.inference." not in name]
    found = [os.path.realpath(import_module(name).__file__) for name in names]
    require_active()
    return found


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("\\n".join(["FILES", *pool.map(files, [0])[0]]))
"""


@pytest.fixture(scope="module")
def released(copy_project, run, tmp_path_factory):
    """The sdist, built from a copy of the checkout, and the wheel, built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")

    def build(kind, source):
        said = run(sys.executable, "-c", BUILD.format(kind=kind, folder=str(folder)), cwd=source).stdout
        return folder / said.splitlines()[-1]

    sdist = build("sdist", copy_project(folder / "project", "src", "nemo", "examples", "docs"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", source)


def files_of(checkout, *folders):
    """Scripts, modules and configs below folders of the checkout, and the pages of its documentation."""
    paths = [path for folder in folders for path in (checkout / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    paths = [path for path in paths if "__pycache__" not in path.parts]
    return {path.relative_to(checkout).as_posix() for path in [*paths, *(checkout / "docs").glob("*.md")]}


def version_of(checkout):
    """The version that pyproject.toml has."""
    return re.search(r'^version = "(.+)"', (checkout / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]


@pytest.mark.integration
def test_the_sdist_has_patch_set_examples_and_licence(released, checkout):
    with tarfile.open(released[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml", "requirements/test.txt"}
    assert wanted | files_of(checkout, "nemo", "examples", "src") <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.integration
def test_the_wheel_has_patch_set_examples_licence_and_description(released, checkout):
    with zipfile.ZipFile(released[1]) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        said = archive.read(metadata).decode()
    assert files_of(checkout, "nemo", "examples") <= {name.removeprefix("nemo_streaming_ssl/_tree/") for name in names}
    assert any(name.endswith("LICENSE") for name in names)
    assert f"Version: {version_of(checkout)}\n" in said and "Provides-Extra: dev" in said
    assert (checkout / "README.md").read_text(encoding="utf-8").strip() in said


def test_the_changelog_has_the_version(checkout):
    headings = [line for line in (checkout / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].startswith(f"## {version_of(checkout)} - ")


@pytest.mark.integration
def test_installed_from_the_wheel_all_of_it_is_in_use_and_examples_are_copied_out(
    released, fresh_venv, run, tmp_path, checkout
):
    """All of NeMo's ASR is imported, in a spawned process."""
    fresh_venv.install(released[1])
    (tmp_path / "spawned.py").write_text(SPAWNED)
    found = run(fresh_venv.python, tmp_path / "spawned.py").stdout.partition("FILES\n")[2].split()
    own = (fresh_venv.site_packages / "nemo_streaming_ssl/_tree/nemo").rglob("*.py")
    later = "/asr/inference/"  # of packages that NeMo 2.5.3 does not have
    has_later = any(later in each for each in found)
    assert sorted(found) == sorted(str(file) for file in own if has_later or later not in str(file))
    run(fresh_venv.python, "-m", "nemo_streaming_ssl", "examples", tmp_path / "mine")
    copied = {path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*.*")}
    examples = checkout / "examples"
    assert {path.relative_to(examples) for path in examples.rglob("*.py")} <= copied
    assert Path("asr/conf/ssl/nest/nest_next_token_streaming.yaml") in copied
