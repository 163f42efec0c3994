# SPDX-License-Identifier: Apache-2.0
"""List the licence of every pinned package by its own metadata; `make release` runs it.

python .ci/licences.py requirements/constraints-3.0.0.txt
"""

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path

NOT_STATED = 'not stated'
NOTES = {'espeakng-loader': 'not stated; it carries eSpeak NG, GPL-3.0-or-later (tests and demo only)'}
LONGEST = 60  # some packages put the whole text where the name belongs


def pins(path: Path) -> dict[str, str]:
    """Return name -> version of a constraints file."""
    lines = (line.strip() for line in path.read_text(encoding='utf-8').splitlines())
    return dict(line.split('==') for line in lines if line and not line.startswith('#'))


def licence_of(name: str) -> str:
    """Return the licence in a package's metadata: its licence expression, else classifiers, else free text."""
    distribution = metadata.distribution(name)
    about = distribution.metadata
    classifiers = [line.split('::')[-1].strip() for line in about.get_all('Classifier') or [] if 'License ::' in line]
    text = (about.get('License') or '').strip()
    stated = about.get('License-Expression') or ', '.join(classifiers)
    if not stated and 0 < len(text) <= LONGEST:
        stated = text
    return stated or NOTES.get(name) or _first_line_of_a_licence_file(distribution) or NOT_STATED


def _first_line_of_a_licence_file(distribution) -> str:
    for file in distribution.files or []:
        if re.fullmatch(r'(licen[cs]e|copying)(\.\w+)?', file.name, re.IGNORECASE):
            lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
            return lines[0][:LONGEST] if lines else ''
    return ''


def table(path: Path) -> str:
    """Return the licences of a constraints file's packages as a Markdown page."""
    lines = [
        f'# Licences of the packages in {path.name}',
        '',
        'As each package states it in its own metadata. Made by `make release`.',
        '',
        '| package | version | licence |',
        '| --- | --- | --- |',
    ]
    lines += [f'| {name} | {version} | {licence_of(name)} |' for name, version in pins(path).items()]
    return '\n'.join(lines) + '\n'


def main(argv=None) -> int:
    """Print the page."""
    parser = argparse.ArgumentParser(description='List the licences of pinned packages, which must be installed here.')
    parser.add_argument('constraints', type=Path)
    try:
        print(table(parser.parse_args(argv).constraints), end='')
    except (OSError, metadata.PackageNotFoundError) as error:
        print(f'licences: error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
