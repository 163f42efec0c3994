# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""An unknown key is an error that suggests the nearest known one. New in this project."""

import difflib
from typing import Iterable


def check_known(section: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Check that a section of a config has only keys that are known.

    Args:
        section: its full name, such as ``model.train_ds.resumable``.
        keys: those that it has.
        known: those that it may have.

    Raises:
        ValueError: naming the first unknown key, and the nearest known one or, if none is near, all of them.
    """
    known = sorted(known)
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
            hint = f"did you mean {section}.{nearest[0]}?" if nearest else f"{section} takes {', '.join(known)}"
            raise ValueError(f"{section}.{key} is not known; {hint}")
