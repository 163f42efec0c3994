# SPDX-License-Identifier: Apache-2.0
"""What it takes to read, mix and collate an utterance: patched NeMo against stock, in turns.

    python benchmarks/data_loading.py [--turns 7] [--output benchmarks/results]

The figures are CPU times of one process without workers, with the augmentation of the shipped config (half of the
utterances, one segment) and with more of it. A part of a noise file of two minutes is read for each utterance. Stock NeMo
runs in a process of its own with the patches off; both take turns in changing order.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

from measure import CaseProcess, Quick, in_turn, ratio

from nemo.utils.atomic_files import write_text

CASES = Path(__file__).with_name('data_loading_cases.py')
SHIPPED = dict(seconds=16.0, utterances=16, batch=8, prob=0.5, segments=1, format='flac')
VARIED = {
    'shipped config, flac of 16 s': {},
    'wav of 16 s': dict(format='wav'),
    'wav of 4 s': dict(format='wav', seconds=4.0, utterances=32),
    'each utterance mixed, flac of 16 s': dict(prob=1.0),
    'each in up to 4 segments, flac of 16 s': dict(prob=1.0, segments=4),
}
TURN_SECONDS = 0.5  # runs that take less are repeated


def measure(case: dict, turns: int) -> dict:
    """Return the milliseconds of CPU time per utterance, and how many times less than stock NeMo's."""
    names = {'stock': True, 'patched': False}
    with CaseProcess(CASES, case, True) as stock, CaseProcess(CASES, case, False) as patched:
        processes = {'stock': stock, 'patched': patched}
        for name, is_stock in names.items():
            if processes[name].about()['patched'] == is_stock:
                raise RuntimeError(f'{name}: the overlay is {"on" if is_stock else "off"} and should not be')
        runs = in_turn({name: partial(process.run, TURN_SECONDS) for name, process in processes.items()}, turns)
    cpu = {name: [run.cpu for run in taken] for name, taken in runs.items()}
    milliseconds = {
        name: round(1000 * statistics.median(taken) / case['utterances'], 3) for name, taken in cpu.items()
    }
    return {'case': case, 'milliseconds': milliseconds, 'times_less': ratio(cpu['stock'], cpu['patched'])._asdict()}


def main(argv=None) -> int:
    """Measure and print a table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--turns', type=int, default=7)
    parser.add_argument('--output', type=Path, default=Path('benchmarks/results'), help='folder of the JSON')
    parser.add_argument('--quick', action=Quick, small=dict(turns=2))
    options = parser.parse_args(argv)
    if options.turns < 2:
        parser.error('--turns must be 2 or more: a ratio needs its spread')
    results = {}
    print(
        '| utterances | stock, ms | patched, ms | times less (quartiles) |\n| --- | ---: | ---: | ---: |', flush=True
    )
    for name, varied in list(VARIED.items())[: 1 if options.quick else None]:
        results[name] = found = measure({**SHIPPED, **varied}, options.turns)
        low, median, high = found['times_less'].values()
        stock, patched = found['milliseconds']['stock'], found['milliseconds']['patched']
        print(f'| {name} | {stock:.2f} | {patched:.2f} | {median:.1f} ({low:.1f} to {high:.1f}) |', flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    write_text(options.output / 'data_loading.json', json.dumps(results, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
