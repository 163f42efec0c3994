# SPDX-License-Identifier: Apache-2.0
"""Run a benchmark, and put the tables that it prints into a page, in the place of those with the same heads.

    python docs/write_tables.py docs/scale.md python benchmarks/two_processes.py --turns 7

What it prints is shown as it comes. A page that has none of its tables is left as it is, and the exit status is 1.
"""

import os
import subprocess
import sys
from pathlib import Path


def tables_in(text: str) -> list[list[str]]:
    """Return the Markdown tables in a text, each as its lines; the first is its head."""
    found, lines = [], text.splitlines()
    for number, (head, rule) in enumerate(zip(lines, lines[1:])):
        if head.startswith('|') and rule.startswith('|') and not set(rule) - set('|-: '):
            end = next((later for later in range(number, len(lines)) if not lines[later].startswith('|')), len(lines))
            found.append(lines[number:end])
    return found


def alike(one: list[str], other: list[str]) -> int:
    """Return how many rows of two tables begin with the same cell."""
    return len({row.split('|')[1] for row in one[2:]} & {row.split('|')[1] for row in other[2:]})


def with_tables(page: str, printed: str) -> tuple[str, int]:
    """Return a page with its tables replaced by printed ones of the same heads, and how many were.

    Where several tables of the page have the head, the one whose rows begin most alike is replaced.
    """
    replaced = 0
    for new in tables_in(printed):
        same = [old for old in tables_in(page) if old[0] == new[0]]
        if same:
            old = max(same, key=lambda table: alike(table, new))
            page = page.replace('\n'.join(old), '\n'.join(new), 1)
            replaced += 1
    return page, replaced


def printed_by(command: list[str]) -> str:
    """Run a command and return what it prints, which is shown as it comes.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end='', flush=True)
            lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return ''.join(lines)


def main(page: str, *command: str) -> int:
    """Run, replace, and say how much; returns the exit status."""
    path = Path(page)
    text, replaced = with_tables(path.read_text(encoding='utf-8'), printed_by(list(command)))
    print(f'{page}: {replaced} tables written', file=sys.stderr)
    if not replaced:
        return 1
    partial = path.with_suffix('.partial')
    partial.write_text(text, encoding='utf-8')
    os.replace(partial, path)
    return 0


if __name__ == '__main__':
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
