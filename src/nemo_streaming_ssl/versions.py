# SPDX-License-Identifier: Apache-2.0
"""Which NeMo is installed, and whether it is in the range that this project requires."""

import re
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

DISTRIBUTION = "nemo-streaming-ssl"
_warned = False


def nemo_version() -> str | None:
    """Return the version of the NeMo in use (the imported one, else the installed one), or None."""
    from importlib.metadata import PackageNotFoundError, version

    imported = getattr(sys.modules.get("nemo"), "__version__", None)  # may come from PYTHONPATH, not from pip
    if imported is not None:
        return str(imported)
    try:
        return version("nemo_toolkit")
    except PackageNotFoundError:
        return None


def supported_range() -> tuple[str, str]:
    """Return the first NeMo release in the required range, and the first beyond it, by the metadata.

    Raises:
        importlib.metadata.PackageNotFoundError: if this project is on the path, but not installed.
    """
    bounds = {bound.operator: bound.version for bound in _required()}
    return bounds[">="], bounds["<"]


def in_tested_range(version: str) -> bool:
    """Return whether ``version`` is in the range: ``3.0.0rc1`` is, ``2.5.3rc0`` precedes it."""
    from packaging.version import InvalidVersion

    try:
        return bool(_required().contains(version, prereleases=True))
    except InvalidVersion:
        return False


def _required() -> "SpecifierSet":
    from importlib.metadata import requires

    from packaging.requirements import Requirement  # of the packages that NeMo needs

    (nemo,) = [line for line in requires(DISTRIBUTION) or [] if re.match("nemo[-_.]toolkit", line)]
    return Requirement(nemo).specifier


def warn_if_untested() -> None:
    """Warn, once per process, if NeMo is outside the range."""
    global _warned
    if _warned:
        return
    _warned = True
    version = nemo_version()
    if version is None or not in_tested_range(version):
        first, beyond = supported_range()
        warnings.warn(
            f"nemo-streaming-ssl requires nemo_toolkit>={first},<{beyond}; "
            f"found {version or 'one of unknown version'}. Set NEMO_STREAMING_SSL=0 to run stock NeMo.",
            stacklevel=2,
        )
