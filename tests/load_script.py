# SPDX-License-Identifier: Apache-2.0
"""Scripts that stand outside of any package, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_script(path: Path) -> ModuleType:
    """Run a script as a module of a name of its own, anew with each call; its ``__main__`` part does not run."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name.strip('.')}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # pickle looks it up there
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
