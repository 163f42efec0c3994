# SPDX-License-Identifier: Apache-2.0
"""Regular and editable installs into fresh environments, and what is left after an uninstall."""

import json

import pytest

INSTALLS = pytest.mark.parametrize("options", [(), ("--editable",)], ids=["regular", "editable"])
SEEN = "import nemo.constants as c; print(getattr(c, 'PATCHED', False), c.NEMO_ENV_CACHE_DIR)"
PATCHED, STOCK = "True NEMO_CACHE_DIR", "False NEMO_CACHE_DIR"
MODULES = "import sys; print(*sorted(sys.modules))"

CHILDREN = """
import json
import multiprocessing
import sys
import threading


def child(_):
    import nemo.added.part
    import nemo.constants

    return nemo.constants.PATCHED, nemo.constants.__file__, nemo.added.part.PART


if __name__ == "__main__":
    found = {"here": child(0)}
    for method in ("spawn", "forkserver", "fork"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            found[method] = pool.map(child, [0])[0]
    print(json.dumps(found))
"""

REAL = """
import importlib.util
import multiprocessing
import os
import sys

from nemo_streaming_ssl.report import patched_modules, require_active


def files(_=None):
    names = [module.name for module in patched_modules()]
    if importlib.util.find_spec("nemo.collections.asr.inference") is None:  # NeMo before 3.0.0
        names = [name for name in names if ".asr.inference." not in name]
    require_active(*names)
    return [os.path.realpath(importlib.import_module(name).__file__) for name in names]


if __name__ == "__main__":
    if "spawn" in sys.argv:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.map(files, [0])[0]
    else:
        found = files()
    print("\\n".join(["FILES", *found]))
"""


@pytest.mark.integration
@INSTALLS
def test_patched_files_are_in_use_in_every_kind_of_process(fresh_venv, small_project, run, tmp_path, options):
    fresh_venv.install(small_project, *options)
    home = small_project if options else fresh_venv.site_packages / "nemo_streaming_ssl" / "_tree"
    script = tmp_path / "children.py"
    script.write_text(CHILDREN)
    found = json.loads(run(fresh_venv.python, script).stdout)
    assert list(found) == ["here", "spawn", "forkserver", "fork"]
    assert all(seen == [True, str(home / "nemo" / "constants.py"), 1] for seen in found.values())
    for python_options, cwd in [
        ((), tmp_path),
        (("-I",), "/"),
        ((), small_project),
        (("-O",), small_project / "nemo"),
    ]:
        assert fresh_venv(SEEN, *python_options, cwd=cwd).stdout.strip() == PATCHED
    assert fresh_venv(SEEN, NEMO_STREAMING_SSL="0").stdout.strip() == STOCK
    assert run(fresh_venv.python, "-m", "nemo_streaming_ssl").returncode == 0


@pytest.mark.integration
@INSTALLS
def test_uninstall_restores_stock(fresh_venv, small_project, options):
    before = sorted(fresh_venv.site_packages.rglob("*"))
    fresh_venv.install(small_project, *options)
    assert fresh_venv(SEEN).stdout.strip() == PATCHED
    fresh_venv.uninstall()
    assert fresh_venv(SEEN).stdout.strip() == STOCK
    assert fresh_venv("import nemo.added", check=False).returncode == 1
    assert sorted(fresh_venv.site_packages.rglob("*")) == before


@pytest.mark.integration
@INSTALLS
def test_start_up_imports_nothing_more(fresh_venv, small_project, options):
    stock = fresh_venv(MODULES).stdout.split()
    fresh_venv.install(small_project, *options)
    assert set(fresh_venv(MODULES).stdout.split()) - set(stock) == {"nemo_streaming_ssl"}
    imported = fresh_venv("pass", "-X", "importtime").stderr
    assert imported.count("nemo_streaming_ssl") == 1


@pytest.mark.integration
@pytest.mark.parametrize(
    "options, process", [((), "spawn"), (("--editable",), "same")], ids=["regular, spawned child", "editable"]
)
def test_real_patch_set_over_the_real_nemo(fresh_venv, project, run, tmp_path, options, process):
    """All of NeMo's ASR is imported here, once per install: it takes a while."""
    fresh_venv.install(project, *options)
    home = project if options else fresh_venv.site_packages / "nemo_streaming_ssl" / "_tree"
    script = tmp_path / "real.py"
    script.write_text(REAL)
    output = run(fresh_venv.python, script, process, cwd=project).stdout
    files = output.partition("FILES\n")[2].split()
    later = "/asr/inference/"  # of packages that NeMo 2.5.3 has not
    wanted = [str(file) for file in (home / "nemo").rglob("*.py")]
    wanted = [file for file in wanted if later not in file or any(later in each for each in files)]
    assert sorted(files) == sorted(wanted)
