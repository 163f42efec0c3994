# SPDX-License-Identifier: Apache-2.0
"""What is released: an sdist, and the wheel made of it, each enough by itself."""

import re
import shutil
import sys
import tarfile
import zipfile

import pytest

BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({folder!r}))"


@pytest.fixture(scope="module")
def sdist(whole_project, run, tmp_path_factory):
    """The sdist, built from a copy of the checkout."""
    return _build("sdist", whole_project, run, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(sdist, run, tmp_path_factory):
    """The wheel, built from nothing but the sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path_factory.mktemp("unpacked"), filter="data")
        unpacked = tmp_path_factory.getbasetemp() / "unpacked0" / archive.getnames()[0]
    return _build("wheel", unpacked, run, tmp_path_factory.mktemp("dist"))


def _build(kind, source, run, folder):
    said = run(sys.executable, "-c", BUILD.format(kind=kind, folder=str(folder)), cwd=source).stdout
    return folder / said.splitlines()[-1]


def files_of(checkout, *folders):
    """Scripts, modules and configs of the checkout, as its history knows them."""
    kinds = (".py", ".yaml", ".md")
    return {
        path.relative_to(checkout).as_posix()
        for folder in folders
        for path in (checkout / folder).rglob("*")
        if path.suffix in kinds and "__pycache__" not in path.parts
    }


def pages_of(checkout):
    """The pages of the documentation, which errors name."""
    return {f"docs/{path.name}" for path in (checkout / "docs").glob("*.md")}


@pytest.mark.integration
def test_the_sdist_has_patch_set_examples_and_licence(sdist, checkout):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml", "requirements/test.txt"}
    assert wanted | files_of(checkout, "nemo", "examples", "src") | pages_of(checkout) <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.integration
def test_the_wheel_has_patch_set_examples_licence_and_description(wheel, checkout):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        said = archive.read(metadata).decode()
    tree = {name.removeprefix("nemo_streaming_ssl/_tree/") for name in names}
    assert files_of(checkout, "nemo", "examples") | pages_of(checkout) <= tree
    assert any(name.endswith("LICENSE") for name in names)
    assert f"Version: {version_of(checkout)}\n" in said and "Provides-Extra: dev" in said
    assert "Provides-Extra: docs" in said and "Project-URL: NVIDIA NeMo, https://github.com/NVIDIA/NeMo" in said
    assert "Description-Content-Type: text/markdown" in said
    assert (checkout / "README.md").read_text(encoding="utf-8").strip() in said


def version_of(checkout):
    """The version that pyproject.toml has."""
    return re.search(r'^version = "(.+)"', (checkout / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]


def test_the_changelog_has_the_version(checkout):
    headings = [line for line in (checkout / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].startswith(f"## {version_of(checkout)} - ")


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_installed_from_either_it_is_active_and_copies_its_examples_out(
    kind, fresh_venv, run, tmp_path, request, checkout
):
    released = shutil.copy(request.getfixturevalue(kind), tmp_path)
    fresh_venv.install(released)
    module = fresh_venv.python, "-m", "nemo_streaming_ssl"
    assert "active: yes" in run(*module, cwd=tmp_path).stdout
    run(*module, "examples", tmp_path / "mine", cwd=tmp_path)
    copied = {f"examples/{path.relative_to(tmp_path / 'mine').as_posix()}" for path in (tmp_path / "mine").rglob("*")}
    assert files_of(checkout, "examples") <= copied
