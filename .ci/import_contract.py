# SPDX-License-Identifier: Apache-2.0
"""Check with import-linter that the patch set's imports point one way; `make lint` runs it.

    python .ci/import_contract.py [--tree .]

The contract is `.importlinter` in the tree. The patch set's folders are no packages, for NeMo has them, and a name that
is found in NeMo would be judged by NeMo's imports. So both are laid out in a temporary directory: the patch set's files
as they are, NeMo's own beside them as empty files. Also fails on a module that is in no layer of the contract.
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


def without_a_layer(tree: Path, contract: Path) -> list[str]:
    """Return the files of the patch set whose module is in no layer of the contract."""
    layers = []
    for options in read_configuration(str(contract))['contracts_options']:
        if options['type'] == 'layers':
            layers += [name for line in options['layers'] for name in re.findall(r'[\w.]+', line)]
    files = sorted(file.relative_to(tree) for file in (tree / 'nemo').rglob('*.py'))
    return [file.as_posix() for file in files if not any(_is_in(file, layer) for layer in layers)]


def _is_in(file: Path, layer: str) -> bool:
    module = '.'.join(file.with_suffix('').parts).removesuffix('.__init__')
    return f'{module}.'.startswith(f'{layer}.')


def main(argv=None) -> int:
    """Print import-linter's report and the modules without a layer; return the exit status."""
    parser = argparse.ArgumentParser(description='Check that the imports of the patch set point one way.')
    parser.add_argument('--tree', type=Path, default=ROOT, help='a checkout (default: this one)')
    tree = parser.parse_args(argv).tree.resolve()
    contract = tree / '.importlinter'
    without = without_a_layer(tree, contract)
    for file in without:
        print(f'import contract: {file} is in no layer: add its folder to the layers in {contract.name}', flush=True)
    with tempfile.TemporaryDirectory() as staged:
        stage(tree, Path(staged))
        environment = {**os.environ, 'PYTHONPATH': staged, 'NEMO_STREAMING_SSL': '0'}
        command = [sys.executable, '-c', LINTER, '--no-logo', '--no-cache', str(contract)]
        linted = subprocess.run(command, cwd=staged, env=environment)
    return 1 if without or linted.returncode else 0


if __name__ == '__main__':
    sys.exit(main())
