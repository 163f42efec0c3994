# SPDX-License-Identifier: Apache-2.0
"""Measure time and memory of a training step with each objective, in turns.

    python benchmarks/objective_step.py                  # 16 layers of 176, and 17 of 512
    python benchmarks/objective_step.py --quick          # one small case, to see that it runs

The steps are those of ``training_step.py --only step``: the same model, batch and 8192 classes. A ratio is the median
over the turns, with its quartiles. Each objective runs in a process of its own.
"""

import argparse
import statistics
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from measure import GIVE_BACK, CaseProcess, Quick, in_turn, ratio

CASES_SCRIPT = Path(__file__).with_name('training_step_cases.py')
OBJECTIVES = {
    'masked': {},
    'next_token, 1 horizon': {'objective': 'next_token', 'next_token': {'horizons': 1}},
    'next_token, 4 horizons': {'objective': 'next_token', 'next_token': {'horizons': 4}},
    'both, 4 horizons': {'objective': 'both', 'next_token': {'horizons': 4}},
}
SIZES = [dict(batch=4, seconds=16, d_model=176, layers=16), dict(batch=4, seconds=16, d_model=512, layers=17)]
QUICK = [dict(batch=1, seconds=4, d_model=176, layers=1)]
TURN_SECONDS = 0.3  # runs that take less are repeated


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--turns', type=int, default=5, help='timed runs of each objective')
    parser.add_argument('--quick', action=Quick, small=dict(turns=2))
    options = parser.parse_args(argv)
    if options.turns < 2:
        parser.error('--turns must be 2 or more: a ratio needs its spread')
    return options


def measure(size: dict, turns: int) -> list[str]:
    """Time a size in all objectives; returns the rows of the table."""
    case = dict(part='step', contexts=[[80, 0], [-1, 0]], **size)
    name = f"{size['layers']} layers of {size['d_model']}, {size['batch']} x {size['seconds']} s"
    with ExitStack() as stack:
        processes, peaks = {}, {}
        for objective, model in OBJECTIVES.items():
            process = CaseProcess(CASES_SCRIPT, dict(case, model=model), stock=False, environment=GIVE_BACK)
            processes[objective] = stack.enter_context(process)
            peaks[objective] = process.peak()  # one after the other: building is work, too
        runs = {objective: partial(process.run, TURN_SECONDS) for objective, process in processes.items()}
        seconds = {objective: [run.cpu for run in each] for objective, each in in_turn(runs, turns, name).items()}
    rows = []
    for objective, values in seconds.items():
        low, middle, high = ratio(values, seconds['masked'])
        rows.append(
            f'| {name} | {objective} | {statistics.median(values) * 1000:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) | '
            f'{peaks[objective]:.0f} |'
        )
    return rows


def main(argv=None) -> None:
    """Time, and print the table."""
    options = arguments(argv)
    rows = [
        '| model | objective | ms of CPU time | to masked (quartiles) | peak MB |',
        '| --- | --- | ---: | ---: | ---: |',
    ]
    for size in QUICK if options.quick else SIZES:
        rows += measure(size, options.turns)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    print('\n'.join(rows))


if __name__ == '__main__':
    main()
