# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation, as they came with the installed package: errors name them."""

import difflib
from pathlib import Path

from nemo_streaming_ssl import patch_tree


def pages() -> dict[str, str]:
    """Return the title of each page, by its name; a page that only includes another file is left out."""
    found = {}
    for path in sorted((Path(patch_tree()) / "docs").glob("*.md")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        if first.startswith("# "):
            found[path.stem] = first.removeprefix("# ")
    return found


def read_page(name: str) -> str:
    """Return a page in Markdown, by ``contexts`` or ``docs/contexts.md#precedence`` alike.

    Raises:
        ValueError: if there is no such page, with the nearest one or all that there are.
    """
    stem = Path(name.partition("#")[0]).stem
    known = list(pages())
    if stem not in known:
        nearest = difflib.get_close_matches(stem, known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"the pages are {', '.join(known) or 'not installed'}"
        raise ValueError(f"there is no page {stem!r}; {hint}")
    return (Path(patch_tree()) / "docs" / f"{stem}.md").read_text(encoding="utf-8")
