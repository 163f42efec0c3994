# SPDX-License-Identifier: Apache-2.0
"""Keep a documented function under its old name for one more version."""

import functools
import warnings
from collections.abc import Callable
from typing import Any


def renamed(old: str, new: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function under its old name; the first call from each place warns.

    ``old_name = renamed('MaskAudit.old_name', new_name)``
    """

    @functools.wraps(new)
    def under_old_name(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            f"{old} is now {new.__qualname__}; the next version drops the old name", FutureWarning, stacklevel=2
        )
        return new(*args, **kwargs)

    return under_old_name
