# SPDX-License-Identifier: Apache-2.0
"""Serve this project's patch set in place of the NeMo modules of the same dotted names.

``install()`` runs at every interpreter start (from ``nemo_streaming_ssl.pth`` or ``.start``), so this file imports
nothing but ``sys`` until a patched module is imported. It has no speech code.
"""

import sys

TYPE_CHECKING = False  # typing's is not imported: see above
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SWITCH = "NEMO_STREAMING_SSL"  # environment variable; "0" leaves stock NeMo alone
_ROOT = "nemo"
_ORIGINALS: "dict[str, ModuleType | None]" = {}  # dotted name -> the NeMo module that a patched one stands in for (None while it loads)
_COPIED_DUNDERS = ("__all__", "__getattr__", "__dir__")  # the others belong to the patched module itself


def patch_tree() -> str:
    """Return the directory of the patch set's ``nemo/``: in the wheel, or in an editable checkout."""
    if PatchFinder.tree is None:
        import os

        here = os.path.dirname(os.path.realpath(__file__))  # a strict editable install links this file
        packaged = os.path.join(here, "_tree")
        PatchFinder.tree = packaged if os.path.isdir(packaged) else os.path.dirname(os.path.dirname(here))
    return PatchFinder.tree


class PatchFinder:
    """Meta-path finder that answers for the ``nemo.*`` modules of the patch set and for nothing else."""

    tree: "str | None" = None  # see patch_tree()

    @classmethod
    def find_spec(
        cls, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec of the patch set's file for ``fullname``, or None where it has none."""
        if path is None or not fullname.startswith(_ROOT + "."):
            return None
        from importlib.machinery import PathFinder

        folder = "/".join([patch_tree(), *fullname.split(".")[:-1]])
        spec = PathFinder.find_spec(fullname, [folder], target)
        if spec is None or not spec.has_location:  # only a directory above a patched module
            return None
        if spec.submodule_search_locations is not None:  # a patched package keeps NeMo's other submodules
            _add_original_folders(spec, path)
        from nemo_streaming_ssl.versions import warn_if_untested

        warn_if_untested()
        return spec


def install() -> None:
    """Put the finder first on ``sys.meta_path``, once; with ``NEMO_STREAMING_SSL=0`` do nothing."""
    import os

    if os.environ.get(SWITCH, "1") != "0" and PatchFinder not in sys.meta_path:
        sys.meta_path.insert(0, PatchFinder)


def upstream(namespace: "dict[str, Any]") -> "Any":
    """Load the NeMo module that a patched module stands in for, and return it.

    Every name of the original is copied into ``namespace``, so what the patch does not redefine stays importable
    from the same place. The original keeps its dotted ``__name__`` (NeMo writes ``cfg.target`` from it) but stays
    out of ``sys.modules``. It is loaded once per process: a reload of the patched module finds the same classes.

    Args:
        namespace: the patched module's ``globals()``.

    Returns:
        The original module.

    Raises:
        ModuleNotFoundError: if NeMo has no module of that name.
        ImportError: if the module found is a file of the patch set.
    """
    name = namespace["__name__"]
    if name not in _ORIGINALS:
        _ORIGINALS[name] = None
        try:
            _ORIGINALS[name] = _load_original(name)
        finally:
            if _ORIGINALS[name] is None:
                del _ORIGINALS[name]
    original = _ORIGINALS[name]
    if original is None:
        raise ImportError(f"the module found in NeMo's place for {name!r} is a file of the patch set", name=name)
    for key, value in vars(original).items():
        if key in _COPIED_DUNDERS or not (key.startswith("__") and key.endswith("__")):
            namespace[key] = value
    return original


def _add_original_folders(spec: "ModuleSpec", parent_path: "Iterable[str]") -> None:
    import os

    locations = spec.submodule_search_locations
    assert locations is not None
    for folder in _outside_patch_set(parent_path):
        original = os.path.join(folder, spec.name.rpartition(".")[2])
        if os.path.isdir(original):
            locations.append(original)


def _outside_patch_set(folders: "Iterable[str]") -> list[str]:
    own = f"{patch_tree()}/{_ROOT}/"  # and no more: an environment, and NeMo in it, may be inside the checkout
    return [folder for folder in folders if not folder.startswith(own)]


def _load_original(name: str) -> "ModuleType":
    import importlib.util

    parent = sys.modules.get(name.rpartition(".")[0])
    search = _outside_patch_set(getattr(parent, "__path__", ()))
    for finder in sys.meta_path if search else ():
        spec = finder.find_spec(name, search) if finder is not PatchFinder and hasattr(finder, "find_spec") else None
        if spec is not None and spec.loader is not None and spec.has_location:
            break
    else:
        raise ModuleNotFoundError(f"NeMo has no module {name!r} to patch", name=name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
