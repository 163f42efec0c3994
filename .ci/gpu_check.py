# SPDX-License-Identifier: Apache-2.0
"""Run the tests and benchmarks that need a GPU, and write one report; `make gpu-check` runs it.

    python .ci/gpu_check.py [--output gpu-report.md] [--quick]

Runs the tests that are marked for a GPU, and times a training step and attention by blocks against stock NeMo with CUDA
events. The report is Markdown, to be pasted into an issue. Ends with 1 if something failed, or if there is no GPU.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ('nemo_toolkit', 'torch', 'lightning')
MOST_CHARACTERS = 3000  # of the end of a failed command's output
TESTS = ('-m', 'pytest', '-q', '-m', 'run_only_on', 'tests')
BENCHMARKS = {
    'Training step': ('benchmarks/training_step.py', '--device', 'cuda'),
    'Attention by blocks, encoder': ('benchmarks/attention.py', '--part', 'encoder', '--device', 'cuda'),
    'When `auto` uses blocks': ('benchmarks/attention.py', '--part', 'rule', '--device', 'cuda'),
}
QUICK = {
    'Training step': ('--quick', '--turns', '3', '--step-turns', '2'),
    'Attention by blocks, encoder': ('--minutes', '0.25', '1', '--contexts', '40', '--turns', '3', '--layers', '3'),
    'When `auto` uses blocks': ('--contexts', '40', '--turns', '3'),
}


class Section(NamedTuple):
    """A part of the report."""

    title: str
    text: str
    passed: bool


def why_not() -> str | None:
    """Return why nothing can be checked; None: there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return None
    build = 'it was built without CUDA' if torch.version.cuda is None else 'it was built with CUDA'
    return f"gpu-check: NOTHING WAS CHECKED: torch {torch.__version__} finds no GPU here ({build})"


def run(command: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Run a command of this interpreter at the project's root; its output is also shown."""
    print('==', ' '.join(command), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-MOST_CHARACTERS:], flush=True)
    return done


def machine() -> Section:
    """Name the device, its driver and what is installed."""
    import torch

    rows = {f'device {index}': torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    rows.update(driver=driver(), CUDA=torch.version.cuda, Python=platform.python_version())
    rows.update({package: version(package) for package in PACKAGES})
    lines = ['| what | which |', '| --- | --- |', *(f'| {name} | {value} |' for name, value in rows.items())]
    return Section('Machine', '\n'.join(lines), True)


def driver() -> str:
    """Return the version of the driver."""
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split('\n')[0]
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def tests(command: tuple[str, ...] = TESTS) -> Section:
    """Run the tests that are marked for a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / 'results.xml'
        done = run((*command, f'--junitxml={results}'))
        if not results.exists():
            return failed('Tests', done)
        text, passed = test_table(ElementTree.parse(results).getroot())
    return Section('Tests', text, passed and done.returncode == 0)


def test_table(root: ElementTree.Element) -> tuple[str, bool]:
    """Return a table of JUnit results, and whether something passed and nothing failed.

    Args:
        root: of the XML that pytest writes.
    """
    outcomes = {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in root.iter('testcase')}
    counts = Counter(outcomes.values())
    lines = ['| outcome | tests |', '| --- | ---: |', *(f'| {name} | {counts[name]} |' for name in sorted(counts))]
    bad = [name for name, found in outcomes.items() if found == 'failed']
    lines += ['', *(f'- failed: `{name}`' for name in bad)] if bad else []
    return '\n'.join(lines), bool(counts['passed']) and not bad


def outcome(case: ElementTree.Element) -> str:
    """Return what became of a test."""
    if case.find('failure') is not None or case.find('error') is not None:
        return 'failed'
    return 'passed' if case.find('skipped') is None else 'skipped'


def benchmark(title: str, command: tuple[str, ...]) -> Section:
    """Run a benchmark, and take its tables."""
    done = run(command)
    if done.returncode:
        return failed(title, done)
    return Section(title, f"`python {' '.join(command)}`\n\n{done.stdout.strip()}", True)


def failed(title: str, done: subprocess.CompletedProcess) -> Section:
    """Return the section of a command that failed: the end of its output."""
    printed = (done.stdout + done.stderr)[-MOST_CHARACTERS:]
    return Section(title, f'It ended with {done.returncode}:\n\n```text\n{printed}\n```', False)


def report(sections: list[Section]) -> str:
    """Join sections to one page of Markdown."""
    verdict = 'passed' if all(section.passed for section in sections) else 'FAILED'
    parts = [f'# GPU check: {verdict}']
    for section in sections:
        parts.append(f"## {section.title}{'' if section.passed else ': FAILED'}\n\n{section.text}")
    return '\n\n'.join(parts) + '\n'


def main(argv=None) -> int:
    """Check, and write the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--output', type=Path, default=Path('gpu-report.md'), help='where the report goes')
    parser.add_argument('--quick', action='store_true', help='one small case of each benchmark, to see that it runs')
    options = parser.parse_args(argv)
    reason = why_not()
    if reason is not None:
        print(reason)
        return 1
    sections = [machine(), tests()]
    for title, command in BENCHMARKS.items():
        sections.append(benchmark(title, command + (QUICK[title] if options.quick else ())))
    options.output.write_text(report(sections))
    print(f'Wrote {options.output}')
    return 0 if all(section.passed for section in sections) else 1


if __name__ == '__main__':
    sys.exit(main())
