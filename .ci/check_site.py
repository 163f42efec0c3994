# SPDX-License-Identifier: Apache-2.0
"""Check the built site: it documents every public name, and its links lead somewhere.

python .ci/check_site.py docs/_build/html docs/_build/linkcheck
"""

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ('nemo', 'src/nemo_streaming_ssl')
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Errors of links that cannot be checked; all others are broken links.
NO_NETWORK = ('Max retries exceeded', 'Failed to resolve', 'Connection refused', 'Network is unreachable', 'timed out')


def public_names(path: Path, module: str) -> list[str]:
    """Return the full names of a file's public classes, functions and methods."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    found = []
    for node in tree.body:
        if isinstance(node, DEFINITIONS) and not node.name.startswith('_'):
            found.append(f'{module}.{node.name}')
            if isinstance(node, ast.ClassDef):
                found += [
                    f'{module}.{node.name}.{inner.name}'
                    for inner in node.body
                    if isinstance(inner, DEFINITIONS) and not inner.name.startswith('_')
                ]
    return found


def modules() -> dict[str, Path]:
    """Return the files of the patch set and of the overlay, by their dotted names."""
    found = {}
    for source in SOURCES:
        base = (ROOT / source).parent
        for path in sorted((ROOT / source).rglob('*.py')):
            parts = path.relative_to(base).with_suffix('').parts
            if parts[-1] != '__main__':
                found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def without_page(inventory: set[str]) -> list[str]:
    """Return the public names that are not among the names the site has a place for."""
    return [name for module, path in modules().items() for name in public_names(path, module) if name not in inventory]


def broken_links(output: str) -> tuple[list[str], int]:
    """Read what Sphinx' link checker wrote.

    Args:
        output: of ``output.json``, a JSON object a line.

    Returns:
        each broken link, with its page and what is wrong, and how many could not be checked without a network.
    """
    links = [json.loads(line) for line in output.splitlines() if line.strip()]
    failed = [link for link in links if link['status'] in ('broken', 'timeout')]
    unreached = [link for link in failed if any(sign in link['info'] for sign in NO_NETWORK)]
    broken = [link for link in failed if link not in unreached]
    return [f"{link['filename']}:{link['lineno']}: {link['uri']}: {link['info']}" for link in broken], len(unreached)


def main(site: Path, links: Path) -> int:
    """Print what is missing or broken; return the exit status."""
    from sphinx.util.inventory import InventoryFile

    with open(site / 'objects.inv', 'rb') as file:
        inventory = InventoryFile.load(file, '', lambda base, name: name)
    missing = without_page({name for kind, names in inventory.items() if kind.startswith('py:') for name in names})
    broken, unreached = broken_links((links / 'output.json').read_text(encoding='utf-8'))
    for name in missing:
        print(f'{name} has no place in the API reference', file=sys.stderr)
    for link in broken:
        print(f'broken link: {link}', file=sys.stderr)
    if unreached:
        print(f'docs: {unreached} LINKS TO OTHER SITES WERE NOT CHECKED: they cannot be reached from here')
    return 1 if missing or broken else 0


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
