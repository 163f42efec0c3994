# SPDX-License-Identifier: Apache-2.0
"""The tested range of NeMo and its pins, and the patch set held against the installed NeMo, file by file."""

import os
import re
from importlib import metadata, util
from pathlib import Path

import pytest

from nemo_streaming_ssl import patch_tree, versions
from nemo_streaming_ssl.report import patched_modules

ROOT = Path(__file__).resolve().parents[2]
TESTED = sorted(path.stem.partition("-")[2] for path in ROOT.glob("requirements/constraints-*.txt"))
LATER = "nemo.collections.asr.inference."  # a package that NeMo 2.5.3 does not have


INSIDE = "2.5.3 2.5.3.post1 2.6.0rc1 2.10 3.0.0rc1 3.0 3.0.7+cu12 v3.0.0".split()
OUTSIDE = [*"2.5.2 2.5.3rc0 2.5.3.dev1 2.5 3.1 3.1.0rc1 3.1.dev0 10.0 main".split(), ""]


@pytest.mark.parametrize("version", [*INSIDE, *OUTSIDE])
def test_the_tested_range(version):
    assert versions.in_tested_range(version) == (version in INSIDE)


def test_untested_version_warns_once_on_the_first_patched_import(stand_in):
    stand_in.add_nemo({"__init__.py": "__version__ = '9.8.7'\n", "plain.py": "", "tools/__init__.py": ""})
    stand_in.python("""
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            import nemo.plain, nemo.tools.nail
            assert caught == []
            import nemo.tools.saw, nemo.tools.plane
        assert len(caught) == 1 and 'found 9.8.7' in str(caught[0].message), caught
        """)


def lines_of(name):
    lines = (line.strip() for line in (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pins(version):
    return dict(line.split("==") for line in lines_of(f"constraints-{version}.txt"))


@pytest.mark.parametrize("version", TESTED)
def test_constraints_pin_the_tests_and_one_nemo(version):
    pinned = pins(version)
    assert pinned["nemo-toolkit"] == version and versions.in_tested_range(version)
    assert list(pinned) == sorted(pinned) and set(lines_of("test.txt")) <= set(pinned)


@pytest.mark.integration
@pytest.mark.skipif(not os.environ.get("CI"), reason="an environment made by hand may hold more than the pins")
def test_installed_packages_are_the_pinned_ones():
    installed = {
        re.sub(r"[-_.]+", "-", distribution.name).lower(): distribution.version.split("+")[0]
        for distribution in metadata.distributions()
    }
    own = {"pip", "nemo-streaming-ssl"}
    pinned = pins(versions.nemo_version())
    assert {name: version for name, version in installed.items() if name not in own} == pinned


def nemo_has_package(folder):
    nemo = Path(util.find_spec("nemo").origin).parent
    return (nemo.parent / folder / "__init__.py").is_file()


def modules():
    """The modules of the patch set that this NeMo can have."""
    later = nemo_has_package(LATER.replace(".", "/"))
    return [module for module in patched_modules() if later or not module.name.startswith(LATER)]


def test_a_module_loads_its_original_and_lies_in_packages():
    """A module without ``upstream()`` would lose names that others import from it."""
    assert not [module.name for module in modules() if module.stands_in != (module.original is not None)]
    folders = {folder for each in modules() for folder in Path(each.file).relative_to(patch_tree()).parents[:-1]}
    own = {folder for folder in folders if Path(patch_tree(), folder, "__init__.py").is_file()}
    assert not [folder for folder in folders - own if not nemo_has_package(folder)]


def test_no_original_looks_itself_up_while_it_loads():
    """An original loads beside ``sys.modules``: there dataclasses would miss a ClassVar that is a mere string."""
    for original in filter(None, (module.original for module in modules())):
        source = Path(original).read_text(encoding="utf-8")
        words = set(source.replace("[", " ").split())
        assert "import annotations" not in source or not {"ClassVar", "InitVar"} & words, original
        assert "sys.modules[__name__]" not in source, original


def test_nemo_itself_is_not_shadowed_from_the_checkouts_root():
    assert not (ROOT / "nemo" / "__init__.py").exists()
