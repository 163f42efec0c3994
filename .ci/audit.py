# SPDX-License-Identifier: Apache-2.0
"""Check pinned packages for known vulnerabilities with pip-audit; `make audit` runs it.

    python .ci/audit.py requirements/constraints-3.0.0.txt [--allowed requirements/allowed_vulnerabilities.json]

Fails on a known vulnerability that is not allowed, with a reason, in the list of allowed ones, and on an allowed one
that is no longer found. pip-audit queries a service. A package that it cannot query is printed, and is no failure.
If nothing was checked, the report is never that nothing was found.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds


def run_pip_audit(constraints: Path) -> tuple[list, str]:
    """Return pip-audit's entry for each package, or its last words if it gave none."""
    command = [sys.executable, '-m', 'pip_audit', '--requirement', str(constraints), '--no-deps', '--disable-pip']
    command += ['--vulnerability-service', 'pypi', '--format', 'json', '--progress-spinner', 'off']
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        return json.loads(done.stdout)['dependencies'], ''
    except subprocess.TimeoutExpired:
        return [], f'no answer within {TIMEOUT} seconds'
    except json.JSONDecodeError:
        return [], (done.stderr.strip().splitlines() or ['no output'])[-1]


def read_allowed(path: Path) -> dict[str, str]:
    """Return the allowed vulnerabilities, id -> reason.

    Raises:
        ValueError: if one has no reason.
    """
    allowed = json.loads(path.read_text(encoding='utf-8'))
    for name, reason in allowed.items():
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f'{path}: {name} has no reason')
    return allowed


def judge(entries: list, allowed: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return what is wrong and what is worth knowing, a line each."""
    wrong, notes, found = [], [], set()
    unasked = [entry['name'] for entry in entries if 'skip_reason' in entry]
    for entry in entries:
        for vulnerability in entry.get('vulns', []):
            names = {vulnerability['id'], *vulnerability.get('aliases', [])}
            fixed = ', '.join(vulnerability.get('fix_versions', [])) or 'no version yet'
            known = sorted(names & set(allowed))
            line = f"{entry['name']} {entry['version']}: {vulnerability['id']}, mended in {fixed}"
            found |= set(known)
            (notes if known else wrong).append(f'{line}; allowed: {allowed[known[0]]}' if known else line)
    if unasked:
        notes.append(f"{len(unasked)} of {len(entries)} packages COULD NOT BE CHECKED: {', '.join(unasked)}")
    elif entries:
        wrong += [
            f'{name} is allowed, but no longer found: take it off the list' for name in sorted(set(allowed) - found)
        ]
    return wrong, notes


def main(argv=None) -> int:
    """Run the check; return 1 if a vulnerability is known that is not allowed."""
    parser = argparse.ArgumentParser(description='Check pinned packages for known vulnerabilities.')
    parser.add_argument('constraints', type=Path)
    parser.add_argument('--allowed', type=Path, default=ROOT / 'requirements/allowed_vulnerabilities.json')
    options = parser.parse_args(argv)
    try:
        allowed = read_allowed(options.allowed)
    except (OSError, ValueError) as error:
        print(f'audit: error: {error}', file=sys.stderr)
        return 1
    entries, silence = run_pip_audit(options.constraints)
    wrong, notes = judge(entries, allowed)
    checked = sum('skip_reason' not in entry for entry in entries)
    print('\n'.join([*notes, *wrong]))
    if not checked:
        print(
            f'audit: NOTHING WAS CHECKED: the service cannot be reached from here ({silence or "it knows no package"})'
        )
    else:
        print(f'audit: {checked} packages of {options.constraints.name} checked, {len(wrong)} problems')
    return int(bool(wrong))


if __name__ == '__main__':
    sys.exit(main())
