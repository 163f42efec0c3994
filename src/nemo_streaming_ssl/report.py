# SPDX-License-Identifier: Apache-2.0
"""Report whether the patched modules are in use, by looking at files, without importing NeMo."""

import os
import re
import site
import sys
from importlib import metadata, util
from typing import NamedTuple

from nemo_streaming_ssl import SWITCH, PatchFinder, patch_tree
from nemo_streaming_ssl.versions import DISTRIBUTION, in_tested_range, nemo_version, supported_range

START_UP_FILE = "nemo_streaming_ssl.pth"
_UPSTREAM_CALL = re.compile(r"^[^#\n]*\bupstream\(globals\(\)\)", re.MULTILINE)


class PatchedModule(NamedTuple):
    """A module of the patch set, by its dotted name."""

    name: str
    file: str
    original: str | None  # NeMo's file of that name, if NeMo has one
    stands_in: bool  # whether the file loads its original: it calls ``upstream(globals())``

    @property
    def kind(self) -> str:
        """``patched`` if it stands in for a NeMo module, ``added`` if it is new."""
        return "patched" if self.stands_in or self.original is not None else "added"


def patched_modules() -> list[PatchedModule]:
    """Return every module of the patch set, patched or added, as ``PatchedModule``, sorted by name."""
    tree, nemo = patch_tree(), _nemo_folder()
    found = []
    for folder, _, files in os.walk(os.path.join(tree, "nemo")):
        for file in files:
            if file.endswith(".py"):
                found.append(_describe(os.path.join(folder, file), tree, nemo))
    return sorted(found)


def report_lines() -> list[str]:
    """Return the report as lines: NeMo's version, active or why not, modules and their files."""
    problem = _why_inactive()
    lines = [
        f"{DISTRIBUTION} {_own_version()}, patch set in {os.path.join(patch_tree(), 'nemo')}",
        _nemo_line(),
        "active: yes, patched modules are served in place of NeMo's" if problem is None else f"active: NO, {problem}",
    ]
    return lines + [_module_line(module) for module in patched_modules()]


def require_active() -> list[str]:
    """Check that the patched modules are in use, those that are imported already included.

    Returns:
        The lines of :func:`report_lines`, for a log.

    Raises:
        RuntimeError: if the patch set is inactive, or a module of NeMo was imported in place of a patched one.
    """
    problem = _why_inactive()
    if problem is not None:
        raise RuntimeError(f"the patched NeMo modules are not in use: {problem}")
    return report_lines()


def _describe(file: str, tree: str, nemo: str | None) -> PatchedModule:
    relative = os.path.relpath(file, tree)[: -len(".py")]
    parts = relative.split(os.sep)
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    with open(file, encoding="utf-8") as source:
        stands_in = _UPSTREAM_CALL.search(source.read()) is not None
    return PatchedModule(".".join(parts), file, _original_file(nemo, parts[1:]), stands_in)


def _original_file(nemo: str | None, parts: list[str]) -> str | None:
    if nemo is None:
        return None
    base = os.path.join(nemo, *parts)
    candidates = (os.path.join(base, "__init__.py"), base + ".py")
    return next((file for file in candidates if os.path.isfile(file)), None)


def _nemo_folder() -> str | None:
    try:
        spec = util.find_spec("nemo")  # a top-level name: nothing is imported
    except ValueError:  # a stand-in module without a spec
        return None
    return os.path.dirname(spec.origin) if spec is not None and spec.origin else None


def _why_inactive() -> str | None:
    """Return why the patched modules are not in use, or None if they are."""
    if PatchFinder not in sys.meta_path:
        return _why_not_installed()
    if _nemo_folder() is None:
        return "NeMo is not installed (pip install 'nemo_toolkit[asr]')"
    stock = [module.name for module in patched_modules() if _is_stock(module)]
    if not stock:
        return None
    were = "was" if len(stock) == 1 else "were"
    return f"NeMo's own {', '.join(stock)} {were} imported first: import nemo after install(), in a new interpreter"


def _why_not_installed() -> str:
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    if sys.flags.no_site:
        return "this interpreter runs without its start-up files (python -S)"
    files = [os.path.join(folder, START_UP_FILE) for folder in [*site.getsitepackages(), site.getusersitepackages()]]
    present = [file for file in files if os.path.isfile(file)]
    if present:
        return f"the start-up file {present[0]} did not run to its end"
    return (
        f"no site-packages folder of {sys.executable} has the start-up file {START_UP_FILE} (pip install --target, or "
        "PYTHONPATH alone, does not put it there): pip install the project into this environment"
    )


def _is_stock(module: PatchedModule) -> bool:
    if module.name not in sys.modules:
        return False
    file = getattr(sys.modules[module.name], "__file__", None) or ""
    return os.path.realpath(file) != os.path.realpath(module.file)


def _own_version() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _nemo_line() -> str:
    folder = _nemo_folder()
    if folder is None:
        return "NeMo: not found"
    version = nemo_version()
    tested = version is not None and in_tested_range(version)
    first, beyond = supported_range()
    return (
        f"NeMo {version or 'of unknown version'} in {folder}: {'in' if tested else 'NOT in'} the tested range "
        f"(from {first}, below {beyond})"
    )


def _module_line(module: PatchedModule) -> str:
    missing = module.kind == "patched" and module.original is None and _nemo_folder() is not None
    note = "  (this NeMo has no such module: importing it fails)" if missing else ""
    return f"{module.kind:7}  {module.name}  {module.file}{note}"
