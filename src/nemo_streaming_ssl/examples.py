# SPDX-License-Identifier: Apache-2.0
"""Copy the example scripts and their configs out of the installed package."""

import os
import shutil
import tempfile

from nemo_streaming_ssl import patch_tree

COPIED = (".py", ".yaml", ".sbatch")


def copy_examples(target: str | os.PathLike[str]) -> int:
    """Copy ``examples/`` to a new folder, complete or not at all; return the number of files.

    Raises:
        ValueError: if the target exists, or has no parent folder, or this installation has no examples.
    """
    source, target = os.path.join(patch_tree(), "examples"), os.path.abspath(target)
    if os.path.lexists(target):
        raise ValueError(f"{target} exists; name a folder that does not, or remove it first")
    if not os.path.isdir(os.path.dirname(target)):
        raise ValueError(f"{target}: there is no folder {os.path.dirname(target)} to make it in")
    if not os.path.isdir(source):
        raise ValueError(f"this installation has no examples: there is no folder {source}")
    with tempfile.TemporaryDirectory(dir=os.path.dirname(target), prefix=".examples-") as beside:
        made = os.path.join(beside, "examples")
        shutil.copytree(source, made, ignore=_all_but_scripts_and_configs)
        os.rename(made, target)
    return sum(len(files) for _, _, files in os.walk(target))


def _all_but_scripts_and_configs(folder: str, names: list[str]) -> set[str]:
    """Return what ``copytree`` is to leave out: caches, and whatever else is in a checkout."""
    kept = (name for name in names if name.endswith(COPIED) or os.path.isdir(os.path.join(folder, name)))
    return set(names) - set(kept) | {"__pycache__"}
