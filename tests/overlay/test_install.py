# SPDX-License-Identifier: Apache-2.0
"""Regular and editable installs into fresh environments, and what is left after an uninstall."""

import json

import pytest

SEEN = "import nemo.constants as c; print(getattr(c, 'PATCHED', False), c.NEMO_ENV_CACHE_DIR)"
PATCHED, STOCK = "True NEMO_CACHE_DIR", "False NEMO_CACHE_DIR"
MODULES = "import sys; print(*sorted(sys.modules))"

CHILDREN = """
import json
import multiprocessing


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


@pytest.mark.integration
@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["regular", "editable"])
def test_an_install_serves_the_patches_everywhere_until_it_is_removed(
    fresh_venv, small_project, run, tmp_path, options
):
    files, modules = sorted(fresh_venv.site_packages.rglob("*")), set(fresh_venv(MODULES).stdout.split())
    fresh_venv.install(small_project, *options)

    home = small_project if options else fresh_venv.site_packages / "nemo_streaming_ssl" / "_tree"
    (tmp_path / "children.py").write_text(CHILDREN)
    found = json.loads(run(fresh_venv.python, tmp_path / "children.py").stdout)
    assert list(found) == ["here", "spawn", "forkserver", "fork"]
    assert all(seen == [True, str(home / "nemo" / "constants.py"), 1] for seen in found.values())
    places = {(): small_project, ("-I",): "/", ("-OB",): small_project / "nemo"}
    for python_options, cwd in places.items():
        assert fresh_venv(SEEN, *python_options, cwd=cwd).stdout.strip() == PATCHED
    assert fresh_venv(SEEN, NEMO_STREAMING_SSL="0").stdout.strip() == STOCK
    assert run(fresh_venv.python, "-m", "nemo_streaming_ssl").returncode == 0

    assert set(fresh_venv(MODULES).stdout.split()) - modules == {"nemo_streaming_ssl"}  # at the start, and no more

    fresh_venv.pip("uninstall", "--yes", "nemo-streaming-ssl")
    assert fresh_venv(SEEN).stdout.strip() == STOCK
    assert fresh_venv("import nemo.added", check=False).returncode == 1
    assert sorted(fresh_venv.site_packages.rglob("*")) == files
