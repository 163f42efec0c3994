# SPDX-License-Identifier: Apache-2.0
"""Which NeMo the patch set is laid over, and whether it was tested with that one."""

import re
import sys
import warnings

TESTED = ("2.5.3", "2.7.3", "3.0.0")
FIRST_TESTED, FIRST_UNTESTED = (2, 5, 3), (3, 1, 0)
_RELEASE = re.compile(r"v?(\d+)(?:\.(\d+))?(?:\.(\d+))?(?P<rest>.*)")
_PRE_RELEASE = re.compile(r"[-_.]?(a|b|rc|dev)")
_warned = False


def nemo_version():
    """Return the version of the NeMo in use (the imported one, else the installed one), or None."""
    from importlib.metadata import PackageNotFoundError, version

    imported = getattr(sys.modules.get("nemo"), "__version__", None)  # may come from PYTHONPATH, not from pip
    if imported is not None:
        return imported
    try:
        return version("nemo_toolkit")
    except PackageNotFoundError:
        return None


def in_tested_range(version):
    """Tell whether ``version`` lies in 2.5.3 ... 3.0.x: ``3.0.0rc1`` does, ``2.5.3rc0`` comes before it."""
    match = _RELEASE.match(version)
    if match is None:
        return False
    release = tuple(int(number or 0) for number in match.groups()[:3])
    before_first = release == FIRST_TESTED and _PRE_RELEASE.match(match["rest"])
    return FIRST_TESTED <= release < FIRST_UNTESTED and not before_first


def warn_if_untested():
    """Warn, once per process, if NeMo lies outside the tested range."""
    global _warned
    if _warned:
        return
    _warned = True
    version = nemo_version()
    if version is None or not in_tested_range(version):
        warnings.warn(
            f"nemo-streaming-ssl was tested with nemo_toolkit {TESTED[0]} ... {TESTED[-1]}; "
            f"found {version or 'one of unknown version'}. Set NEMO_STREAMING_SSL=0 to run stock NeMo.",
            stacklevel=2,
        )
