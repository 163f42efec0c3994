# SPDX-License-Identifier: Apache-2.0
"""Check with import-linter that the patch set's imports point one way; `make lint` runs it.

    python .ci/import_contract.py [--tree .]

The contract is `.importlinter` in the tree. The patch set's folders are no packages, for NeMo has them, and a name that
is found in NeMo would be judged by NeMo's imports. So both are laid out in a temporary directory: the patch set's files
as they are, NeMo's own beside them as empty files. Also fails on a module that has no floor in the contract.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from importlinter.api import read_configuration

ROOT = Path(__file__).resolve().parents[1]
LINTER = 'from importlinter.cli import lint_imports_command; lint_imports_command()'


def stage(tree: Path, target: Path) -> None:
    """Lay out the patch set and the overlay as packages, with NeMo's own modules as empty files."""
    nemo = Path(importlib.util.find_spec('nemo').origin).parent
    for file in nemo.rglob('*.py'):
        _write(target / 'nemo' / file.relative_to(nemo), b'')
    for folder in (tree / 'nemo', tree / 'src/nemo_streaming_ssl'):
        for file in folder.rglob('*.py'):
            _write(target / file.relative_to(folder.parent), file.read_bytes())
    for folder in [path for path in target.rglob('*') if path.is_dir()]:
        (folder / '__init__.py').touch()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def without_a_floor(tree: Path, contract: Path) -> list[str]:
    """Return the files of the patch set whose module is on no floor of the contract's layers."""
    floors = []
    for options in read_configuration(str(contract))['contracts_options']:
        if options['type'] == 'layers':
            floors += [name for floor in options['layers'] for name in re.findall(r'[\w.]+', floor)]
    files = sorted(file.relative_to(tree) for file in (tree / 'nemo').rglob('*.py'))
    return [file.as_posix() for file in files if not any(_is_on(file, floor) for floor in floors)]


def _is_on(file: Path, floor: str) -> bool:
    module = '.'.join(file.with_suffix('').parts).removesuffix('.__init__')
    return f'{module}.'.startswith(f'{floor}.')


def main(argv=None) -> int:
    """Print import-linter's report and the modules without a floor."""
    parser = argparse.ArgumentParser(description='Check that the imports of the patch set point one way.')
    parser.add_argument('--tree', type=Path, default=ROOT, help='a checkout (default: this one)')
    tree = parser.parse_args(argv).tree.resolve()
    contract = tree / '.importlinter'
    homeless = without_a_floor(tree, contract)
    for file in homeless:
        print(f'import contract: {file} is on no floor: add its folder to the layers in {contract.name}', flush=True)
    with tempfile.TemporaryDirectory() as staged:
        stage(tree, Path(staged))
        environment = {**os.environ, 'PYTHONPATH': staged, 'NEMO_STREAMING_SSL': '0'}
        command = [sys.executable, '-c', LINTER, '--no-logo', '--no-cache', str(contract)]
        linted = subprocess.run(command, cwd=staged, env=environment)
    return 1 if homeless or linted.returncode else 0


if __name__ == '__main__':
    sys.exit(main())
