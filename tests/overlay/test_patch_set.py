# SPDX-License-Identifier: Apache-2.0
"""The patch set itself, held against the installed NeMo file by file. Nothing is imported."""

from pathlib import Path

import pytest

from nemo_streaming_ssl import patch_tree
from nemo_streaming_ssl.report import patched_modules

LATER = ("nemo/collections/asr/inference",)  # packages that only later NeMo has; 2.5.3 has not


def _has_package(folder):
    import importlib.util

    nemo = Path(importlib.util.find_spec("nemo").origin).parent
    return (nemo / Path(folder).relative_to("nemo") / "__init__.py").is_file()


def _nemo_is_late_enough(module):
    own = Path(module.file).relative_to(patch_tree()).as_posix()
    return all(_has_package(package) for package in LATER if own.startswith(package + "/"))


MODULES = [module for module in patched_modules() if _nemo_is_late_enough(module)]
EACH_MODULE = pytest.mark.parametrize("module", MODULES, ids=[module.name for module in MODULES])


@EACH_MODULE
def test_stands_in_for_a_module_that_nemo_has(module):
    """Who calls ``upstream()`` has an original; who has one must call it, or names that others import go missing."""
    assert module.stands_in == (module.original is not None)


@EACH_MODULE
def test_every_folder_on_the_way_is_a_package(module):
    for folder in Path(module.file).relative_to(patch_tree()).parents[:-1]:
        in_patch_set = Path(patch_tree(), folder, "__init__.py").is_file()
        assert in_patch_set or _has_package(folder), f"{folder} needs an __init__.py: NeMo has no such package"


def test_nemo_itself_is_not_shadowed_from_the_checkouts_root(checkout):
    assert not (checkout / "nemo" / "__init__.py").exists()


@EACH_MODULE
def test_original_does_not_look_itself_up_while_it_loads(module):
    """An original loads beside ``sys.modules``: there dataclasses would miss a ClassVar that is a mere string."""
    source = Path(module.original).read_text(encoding="utf-8") if module.original else ""
    assert "import annotations" not in source or not {"ClassVar", "InitVar"} & set(source.replace("[", " ").split())
    assert "sys.modules[__name__]" not in source
