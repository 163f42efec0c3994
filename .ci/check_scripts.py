# SPDX-License-Identifier: Apache-2.0
"""Compile every Python file, and run each script of examples/ and benchmarks/ with --help.

    python .ci/check_scripts.py [FOLDER ...]

NeMo is imported once. Each script runs in a fork of this process.
"""

import os
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITH_SCRIPTS = ('examples', 'benchmarks')
SERVED = '_cases'  # a benchmark starts these, with JSON
MAIN = "if __name__ == '__main__'"
IMPORTED_ONCE = (
    'nemo.collections.asr.models.ssl_models',
    'nemo.collections.asr.models',
    'nemo.collections.asr.parts.streaming',
    'nemo.utils.exp_manager',
)


def broken_files(folders: list[Path]) -> list[str]:
    """Return the syntax error of each Python file that does not compile."""
    found = []
    for path in sorted(path for folder in folders for path in folder.rglob('*.py')):
        try:
            compile(path.read_text(encoding='utf-8'), str(path.relative_to(ROOT)), 'exec')
        except SyntaxError as error:
            found.append(f'{path.relative_to(ROOT)}:{error.lineno}: {error.msg}')
    return found


def run_help(script: Path) -> str | None:
    """Run a script with --help in a fork; return the end of its output if it fails or prints nothing."""
    with tempfile.TemporaryFile('w+') as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv = [str(script), '--help']
            sys.path.insert(0, str(script.parent))
            status = 1
            try:
                runpy.run_path(str(script), run_name='__main__')
                status = 0
            except SystemExit as end:
                status = 0 if end.code in (None, 0) else 1
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        printed = output.read()
    return None if status == 0 and printed.strip() else printed[-1000:] or 'it printed nothing'


def main(*folders: str) -> int:
    """Check all folders; return the exit status."""
    failed = broken_files([ROOT / folder for folder in folders])
    scripts = [path for folder in WITH_SCRIPTS for path in sorted((ROOT / folder).rglob('*.py'))]
    scripts = [path for path in scripts if MAIN in path.read_text(encoding='utf-8') and not path.stem.endswith(SERVED)]
    for name in IMPORTED_ONCE:
        __import__(name)
    for script in scripts:
        problem = run_help(script)
        if problem is not None:
            failed.append(f'{script.relative_to(ROOT)} --help fails:\n{problem}')
    for each in failed:
        print(f'check_scripts: {each}', file=sys.stderr)
    print(f'{len(scripts)} scripts show their help' if not failed else f'{len(failed)} problems')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
