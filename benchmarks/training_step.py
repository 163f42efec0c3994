# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a training step and its parts: patched NeMo against stock, in the same run.

    python benchmarks/training_step.py                               # all of it: `make bench`, some 30 minutes
    python benchmarks/training_step.py --only masking quantizer      # parts of it
    python benchmarks/training_step.py --stock .venv/nemo-2.5.3/bin/python   # against another NeMo, too

Stock NeMo runs in processes of its own with the overlay off. The runs of all variants take turns, in changing order,
and a ratio is the median over the turns, with its quartiles. docs/performance.md explains the result.
"""

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from measure import CaseProcess, Ratio, in_turn, machine_rates, ratio
from tqdm import tqdm

from nemo.utils.atomic_files import write_text

CASES_SCRIPT = Path(__file__).with_name('training_step_cases.py')
PARTS = ('masking', 'quantizer', 'decoder and loss', 'step')
PATCHED = 'patched'
VERSION = "from importlib.metadata import version; print(version('nemo_toolkit'))"
TURN_SECONDS = 0.3  # runs that take less are repeated


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS), help='parts to time')
    parser.add_argument('--turns', type=int, default=11, help='timed runs of each variant of a part')
    parser.add_argument('--step-turns', type=int, default=5, help='timed runs of each variant of a whole step')
    parser.add_argument('--stock', nargs='*', default=[], help='other environments whose stock NeMo to time, too')
    parser.add_argument('--quick', action='store_true', help='one small case of each part, to see that it runs')
    parser.add_argument('--device', default='cpu', help='cuda, to time a GPU by its own events')
    parser.add_argument('--output', type=Path, default=Path('benchmarks/results'), help='folder of the JSON and plot')
    options = parser.parse_args(argv)
    if min(options.turns, options.step_turns) < 2:
        parser.error('--turns and --step-turns must be 2 or more: a ratio needs its spread')
    return options


def cases(options: argparse.Namespace) -> list[dict]:
    """Return what to time: each part over batch sizes, lengths and widths."""
    small = options.quick
    made = []
    for overlap in (True, False):
        for batch, seconds in [(2, 4)] if small else [(8, 16), (32, 4), (32, 16)]:
            made.append(dict(part='masking', batch=batch, seconds=seconds, overlap=overlap))
    for batch, seconds in [(1, 4)] if small else [(2, 16), (8, 4), (8, 16)]:
        made.append(dict(part='quantizer', batch=batch, seconds=seconds))
    for d_model in [176] if small else [176, 512]:
        for batch in [2] if small else [4, 16]:
            made.append(dict(part='decoder and loss', batch=batch, seconds=16, d_model=d_model))
    contexts = [[80, 0], [-1, 0]]
    if small:
        made.append(dict(part='step', batch=1, seconds=4, d_model=176, layers=1, contexts=contexts))
    else:
        for batch, seconds, d_model, layers in [(4, 16, 176, 16), (4, 8, 176, 16), (4, 16, 512, 17)]:
            made.append(
                dict(part='step', batch=batch, seconds=seconds, d_model=d_model, layers=layers, contexts=contexts)
            )
    return [dict(case, device=options.device) for case in made if case['part'] in options.only]


def describe(case: dict) -> str:
    """Return a case in words."""
    words = f"{case['part']}, {case['batch']} x {case['seconds']} s"
    if 'overlap' in case:
        words += ', 0.01 x 40 overlapping' if case['overlap'] else ', 0.5 x 48 apart'
    if 'd_model' in case:
        words += f", d_model {case['d_model']}"
    return words + (f", {case['layers']} layers" if 'layers' in case else '')


def environments(options: argparse.Namespace) -> dict[str, tuple[str, bool]]:
    """Return each variant's interpreter, and whether it runs stock NeMo."""
    variants = {PATCHED: (sys.executable, False)}
    for python in [sys.executable, *options.stock]:
        nemo = subprocess.run([python, '-c', VERSION], check=True, capture_output=True, text=True).stdout.strip()
        variants.setdefault(f'stock {nemo}', (python, True))
    return variants


def measure(case: dict, variants: dict[str, tuple[str, bool]], turns: int) -> dict:
    """Time a case in all variants by turns; return seconds, peak memory, operations and bytes."""
    with ExitStack() as stack:
        processes, about, megabytes = {}, {}, {}
        for name, (python, stock) in variants.items():
            process = stack.enter_context(CaseProcess(CASES_SCRIPT, case, stock, python=python))
            megabytes[name] = process.peak()  # one after the other: building is work, too
            about[name], processes[name] = process.about(), process
            if about[name]['patched'] == stock:
                raise RuntimeError(f'{name}: the overlay is {"on" if stock else "off"} and should not be')
        runs = {name: partial(process.run, TURN_SECONDS) for name, process in processes.items()}
        seconds = in_turn(runs, turns, describe(case))
    return dict(
        case=case,
        name=describe(case),
        seconds={name: [run.clock for run in runs] for name, runs in seconds.items()},
        peak_megabytes=megabytes,
        operations=about[PATCHED]['operations'],
        bytes=about[PATCHED]['bytes'],
    )


def speed_up(result: dict, stock: str) -> Ratio:
    """Return how many times faster the patched NeMo is than a stock one."""
    return ratio(result['seconds'][stock], result['seconds'][PATCHED])


def bound(result: dict, machine: dict) -> float:
    """Return the least seconds on this machine: operations and bytes at the measured rates."""
    operations = result['operations'] / machine['operations_per_second']
    return max(operations, result['bytes'] / machine['bytes_per_second'])


def table(results: list[dict], machine: dict) -> str:
    """Return the results as a Markdown table, a row for each case and stock NeMo."""
    rows = [
        '| case | stock | its ms | patched ms | times faster (quartiles) | its peak MB | patched peak MB | bound ms |',
        '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for result in results:
        medians = {name: statistics.median(values) * 1000 for name, values in result['seconds'].items()}
        peaks = result['peak_megabytes']
        for stock in [name for name in medians if name != PATCHED]:
            low, middle, high = speed_up(result, stock)
            rows.append(
                f"| {result['name']} | {stock.split()[1]} | {medians[stock]:.1f} | {medians[PATCHED]:.1f} | "
                f"{middle:.2f} ({low:.2f} to {high:.2f}) | {peaks[stock]:.0f} | {peaks[PATCHED]:.0f} | "
                f"{bound(result, machine) * 1000:.1f} |"
            )
    return '\n'.join(rows)


def plot(results: list[dict], path: Path) -> None:
    """Draw how many times faster and leaner each case is."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    stocks = [name for name in results[0]['seconds'] if name != PATCHED]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.5 + 0.4 * len(results)), sharey=True)
    places = range(len(results))
    for index, stock in enumerate(stocks):
        shifted = [place + 0.35 * (index - (len(stocks) - 1) / 2) for place in places]
        quartiles = [speed_up(result, stock) for result in results]
        medians = [middle for _, middle, _ in quartiles]
        spread = [[middle - low for low, middle, _ in quartiles], [high - middle for _, middle, high in quartiles]]
        left.errorbar(medians, shifted, xerr=spread, fmt='os'[index % 2], label=stock, capsize=3)
        leaner = [result['peak_megabytes'][stock] / max(result['peak_megabytes'][PATCHED], 1) for result in results]
        right.plot(leaner, shifted, 'os'[index % 2], label=stock)
    for axis, title in ((left, 'times faster than'), (right, 'times less memory at the peak than')):
        axis.axvline(1, color='black', linewidth=0.8)
        axis.set_xscale('log')
        axis.set_xlabel(title)
        axis.grid(axis='x', which='both', linewidth=0.3)
        axis.legend()
    left.set_yticks(list(places), [result['name'] for result in results])
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv=None) -> None:
    """Time everything, print the table, and write JSON and plot."""
    options = arguments(argv)
    variants = environments(options)
    machine = dict(
        nemo=version('nemo_toolkit'),
        torch=torch.__version__,
        device=options.device,
        threads=torch.get_num_threads(),
        **machine_rates(options.device),
    )
    results = []
    for case in tqdm(cases(options), desc='cases', unit='case'):
        turns = options.step_turns if case['part'] == 'step' else options.turns
        results.append(measure(case, variants, turns))
    print(
        f"torch {machine['torch']}, {machine['threads']} threads, "
        f"{machine['operations_per_second'] / 1e9:.0f} Gflop/s in a matrix product, "
        f"{machine['bytes_per_second'] / 1e9:.1f} GB/s copied"
    )
    print(table(results, machine))
    options.output.mkdir(parents=True, exist_ok=True)
    suffix = '' if options.device == 'cpu' else f"-{options.device.split(':')[0]}"
    written = options.output / f"training_step-{machine['nemo']}{suffix}.json"
    write_text(written, json.dumps(dict(machine=machine, results=results), indent=1))
    plot(results, written.with_suffix('.png'))
    print(f"Wrote {written} and {written.with_suffix('.png')}")


if __name__ == '__main__':
    main()
