# SPDX-License-Identifier: Apache-2.0
"""Interpreters to look at from outside: one with a miniature NeMo, and fresh environments to install into."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
DROPPED = ("NEMO_STREAMING_SSL", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "VIRTUAL_ENV")
PACKAGING = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")


def run(*command, cwd="/", check=True, **environment):
    """Run a command far from the checkout, in an environment that only ``environment`` adds to."""
    clean = {key: value for key, value in os.environ.items() if key not in DROPPED}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **{key: str(value) for key, value in environment.items()}},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if check and result.returncode != 0:
        raise AssertionError(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def write_tree(root, files):
    """Write ``{relative path: text}`` below ``root``."""
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text), encoding="utf-8")


class StandIn:
    """A miniature NeMo and a miniature patch set over it, for interpreters that start in milliseconds."""

    def __init__(self, root):
        self.nemo, self.patches = root / "site", root / "patches"

    def add_nemo(self, files):
        write_tree(self.nemo / "nemo", files)

    def add_patches(self, files):
        write_tree(self.patches / "nemo", files)

    def python(self, code, *options, check=True, **environment):
        """Run ``code`` in a new interpreter where the miniature patch set is laid over the miniature NeMo."""
        prelude = f"""\
        import sys
        from nemo_streaming_ssl import PatchFinder, install, upstream
        PatchFinder.tree = {str(self.patches)!r}
        sys.path.insert(0, {str(self.nemo)!r})
        """
        source = textwrap.dedent(prelude) + textwrap.dedent(code)
        return run(sys.executable, *options, "-c", source, check=check, **environment)


@pytest.fixture
def stand_in(tmp_path):
    """A miniature NeMo with one patched module, ``nemo.tools.saw``, and one added one, ``nemo.tools.plane``."""
    saw = "from .nail import NAIL\n__all__ = ['Saw', 'Kept']\n_teeth = 12\n"
    saw += "class Saw:\n    def cut(self): return 'stock'\nclass Kept: pass\n"
    patch = "from nemo_streaming_ssl import upstream\nstock = upstream(globals())\n"
    patch += "class Saw(stock.Saw):\n    def cut(self): return super().cut() + ', patched'\n"
    made = StandIn(tmp_path)
    made.add_nemo({"__init__.py": "__version__ = '3.0.0'\n", "tools/__init__.py": "from nemo.tools.saw import Saw\n"})
    made.add_nemo({"tools/nail.py": "NAIL = 'stock nail'\n", "tools/saw.py": saw})
    made.add_patches({"tools/plane.py": "from nemo.tools.saw import Saw\n", "tools/saw.py": patch})
    return made


class FreshVenv:
    """A new virtual environment that sees this interpreter's packages, but runs none of its start-up files.

    What is installed here, this project included, is importable there as plain files; a .pth that lies in a folder
    named by another .pth is not run. So nothing has to be downloaded, and the finder is there only once installed.
    """

    def __init__(self, root):
        folder = root / "venv"
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin" / "python"
        self.site_packages = Path(self("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.site_packages / "zz_packages_of_the_test_run.pth").write_text("\n".join(seen) + "\n")

    def __call__(self, code, *options, **keywords):
        return run(self.python, *options, "-c", textwrap.dedent(code), **keywords)

    def pip(self, *arguments):
        """Run pip, without a network: setuptools and NeMo are those of the test run."""
        return run(self.python, "-m", "pip", *arguments)

    def install(self, project, *options):
        self.pip("install", "--no-deps", "--no-build-isolation", "--no-index", *options, project)


@pytest.fixture(scope="session", name="run")
def run_fixture():
    """``run`` for the tests, which cannot import this file."""
    return run


@pytest.fixture(scope="session")
def checkout():
    """The checkout that these tests lie in."""
    return CHECKOUT


@pytest.fixture
def fresh_venv(tmp_path):
    """An environment with NeMo and without this project."""
    return FreshVenv(tmp_path)


@pytest.fixture(scope="session")
def copy_project():
    """Return a function that copies what packaging reads, with some folders; so builds share no files."""

    def copy(folder, *trees):
        folder.mkdir()
        for name in PACKAGING:
            shutil.copy(CHECKOUT / name, folder / name)
        for name in ("requirements", *trees):
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "_build", "api", "tutorial.ipynb")
            shutil.copytree(CHECKOUT / name, folder / name, ignore=ignore)
        return folder

    return copy


@pytest.fixture
def small_project(tmp_path, copy_project):
    """The project with a patch set over light modules of the real NeMo, which import in milliseconds."""
    folder = copy_project(tmp_path / "small project", "src")
    upstream = "from nemo_streaming_ssl import upstream\n\nupstream(globals())\nPATCHED = True\n"
    write_tree(folder / "nemo", {"constants.py": upstream, "added/__init__.py": "", "added/part.py": "PART = 1\n"})
    return folder
