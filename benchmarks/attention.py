# SPDX-License-Identifier: Apache-2.0
"""Compare time and peak memory of block-wise attention with stock NeMo, forward and backward.

    python benchmarks/attention.py --part encoder                   # 17 layers of 512, 15 s to 10 minutes: takes hours
    python benchmarks/attention.py --part encoder --minutes 0.5 1 4 --contexts 40
    python benchmarks/attention.py --part attention                 # the attention module of one layer
    python benchmarks/attention.py --part rule                      # where `auto` begins to attend block by block
    python benchmarks/attention.py --part blocks                    # which length of a block is the fastest

The two run in turn, stock NeMo in a process with the patches off. Peak memory is what a first run adds to weights and
input, in a process whose allocator returns freed memory. Audio longer than ``--stock_minutes`` is measured block by block
only, because the scores of all pairs of frames would not fit in memory. With layer contexts stock uses the largest one
in all layers. The script prints a table and writes JSON and a plot to ``--output`` after each length. With ``--resume``
it keeps the figures of the JSON and measures the others.
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from attention_cases import HIERARCHICAL, build
from matplotlib.figure import Figure
from measure import GIVE_BACK, CaseProcess, Quick, Seconds, growth_exponent, in_turn, ratio, timed
from tqdm import tqdm

from nemo.collections.asr.parts.att_context import blockwise
from nemo.collections.asr.parts.att_context.blockwise import AttentionBlocks, wins_by_blocks
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.ssl_reports.figures import save_figure
from nemo.utils.atomic_files import write_text

SCRIPT = Path(__file__).with_name('attention_cases.py')
GROWTH_FROM_MINUTES = 2
STOCK, BLOCKS = 'stock', 'blocks'
WAYS = (STOCK, BLOCKS)
LENGTHS = (8, 16, 32, 48, 64, 80, 112, 160)  # of a block, to choose among
LENGTHS_FRAMES = 1500  # of the audio that they are tried on
WINDOWS = (1, 1.5, 2, 3, 4, 6, 8)  # lengths of audio for the rule, in windows of a block


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--part', choices=('encoder', 'attention', 'rule', 'blocks'), default='encoder')
    parser.add_argument(
        '--minutes', type=float, nargs='+', default=[0.25, 0.5, 1, 2, 4, 6, 10], help='minutes of audio'
    )
    parser.add_argument('--contexts', nargs='+', default=['40', '10', '160', HIERARCHICAL], help='left contexts')
    parser.add_argument('--stock_minutes', type=float, default=4.0, help="the longest audio for stock NeMo")
    parser.add_argument('--turns', type=int, default=5, help='timed runs of each')
    parser.add_argument('--layers', type=int, default=17, help='3 or more')
    parser.add_argument('--d_model', type=int, default=512)
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--batch_size', type=int, default=1)
    parser.add_argument('--dropout', type=float, default=0.0, help='dropout; the shipped configs have 0.1')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--sdpa', action='store_true', help="PyTorch's scaled_dot_product_attention")
    parser.add_argument('--forward_only', action='store_true', help='forward pass only, as in inference')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, help='a folder for the JSON and the plot')
    parser.add_argument(
        '--resume', action='store_true', help='measure only figures that are not in the JSON of --output'
    )
    parser.add_argument(
        '--quick', action=Quick, small=dict(minutes=[0.05], contexts=['10'], turns=1, layers=3, d_model=32, heads=2)
    )
    options = parser.parse_args(argv)
    if options.resume and (options.output is None or options.part in TABLES):
        parser.error('--resume continues --part encoder and --part attention, and needs --output')
    return options


def case_of(options: argparse.Namespace, **changes) -> dict:
    """Return the arguments of ``attention_cases.py``."""
    return {
        **{name: value for name, value in vars(options).items() if name not in ('output', 'resume', 'quick')},
        **changes,
    }


def measure_case(options: argparse.Namespace, context: str, minutes: float) -> dict:
    """Return the seconds of all turns and the megabytes of each way, for one context and length."""
    ways = WAYS if minutes <= options.stock_minutes else WAYS[1:]

    def start(way: str, **environment) -> CaseProcess:
        case = case_of(options, context=context, minutes=minutes, stock=way == STOCK)
        return CaseProcess(SCRIPT, case, stock=way == STOCK, environment=environment)

    megabytes = {}
    for way in ways:
        with start(way, **GIVE_BACK) as process:
            megabytes[way] = process.peak()
    with ExitStack() as stack:
        processes = {way: stack.enter_context(start(way)) for way in ways}
        seconds = in_turn({way: process.run for way, process in processes.items()}, options.turns)
    return dict(context=context, minutes=minutes, seconds=seconds, megabytes=megabytes)


def sweep(options: argparse.Namespace) -> list[dict]:
    """Measure every context at every length, and write the report after each: all of them take hours."""
    contexts = [name for name in options.contexts if options.part == 'encoder' or name != HIERARCHICAL]
    cases = [(context, minutes) for context in contexts for minutes in sorted(options.minutes)]
    results = measured(options) if options.resume else []
    known = {(result['context'], result['minutes']) for result in results}
    for case in tqdm([case for case in cases if case not in known], desc='lengths', unit='length'):
        results = by_context([*results, measure_case(options, *case)])
        write(results, options)
    return results


def by_context(results: list[dict]) -> list[dict]:
    """Sort results by context, in the order that contexts come in, and length."""
    contexts = [result['context'] for result in results]
    return sorted(results, key=lambda result: (contexts.index(result['context']), result['minutes']))


def measured(options: argparse.Namespace) -> list[dict]:
    """Return the results in the JSON of ``--output``; none where there is no such file.

    Raises:
        ValueError: if it was measured with other settings or on another machine.
    """
    file = report_file(options)
    if not file.exists():
        return []
    report, expected = json.loads(file.read_text()), heading(options)
    if any(report[key] != value for key, value in expected.items()):
        raise ValueError(f'--resume: {file} has other figures: {[report[key] for key in expected]}, not {expected}')
    for result in report['results']:
        result['seconds'] = {way: [Seconds(*run) for run in runs] for way, runs in result['seconds'].items()}
    return report['results']


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table."""
    columns = ['left context', 'minutes', 'stock s', 'blocks s', 'stock / blocks (quartiles)', 'of CPU time']
    columns += ['stock MB', 'blocks MB']
    lines = ['| ' + ' | '.join(columns) + ' |', '| --- |' + ' ---: |' * (len(columns) - 1)]
    for result in results:
        seconds, cells = result['seconds'], [result['context'], f"{result['minutes']:g}"]
        both = STOCK in seconds
        cells += [f'{median_clock(seconds[way]):.3f}' if way in seconds else '' for way in WAYS]
        cells.append(str(ratio(*([run.clock for run in seconds[way]] for way in WAYS))) if both else '')
        cells.append(f'{ratio(*([run.cpu for run in seconds[way]] for way in WAYS)).median:.3f}' if both else '')
        cells += [f"{result['megabytes'][way]:.0f}" if way in seconds else '' for way in WAYS]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def median_clock(runs: list) -> float:
    """Return the median seconds by the clock."""
    return statistics.median(run.clock for run in runs)


def curves(results: list[dict], way: str) -> dict[str, list[tuple[float, float, float]]]:
    """Return (minutes, median seconds, megabytes) of each context for one way."""
    points = {}
    for result in results:
        if way in result['seconds']:
            point = result['minutes'], median_clock(result['seconds'][way]), result['megabytes'][way]
            points.setdefault(result['context'], []).append(point)
    return points


def growth(results: list[dict]) -> dict:
    """Return the exponents in time and memory, from ``GROWTH_FROM_MINUTES`` on, for each way and context."""
    exponents = {}
    for name in WAYS:
        for context, points in curves(results, name).items():
            points = [point for point in points if point[0] >= GROWTH_FROM_MINUTES]
            if len(points) > 1:
                minutes, seconds, megabytes = zip(*points)
                fitted = dict(time=growth_exponent(minutes, seconds), memory=growth_exponent(minutes, megabytes))
                exponents[f'{name}, left {context}'] = fitted
    return exponents


def plot(results: list[dict], options: argparse.Namespace) -> None:
    """Draw time and memory over length on log axes."""
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    axes = figure.subplots(1, 2)
    exponents = growth(results)
    for name, line in ((STOCK, '--'), (BLOCKS, '-')):
        for index, (context, points) in enumerate(curves(results, name).items()):
            fitted = exponents.get(f'{name}, left {context}')
            for axis, kind, column in ((axes[0], 'time', 1), (axes[1], 'memory', 2)):
                label = f'{name}, left {context}' + (f': {fitted[kind]:.2f}' if fitted else '')
                minutes = [point[0] for point in points]
                axis.loglog(
                    minutes, [point[column] for point in points], line, color=f'C{index}', marker='o', label=label
                )
    for axis, unit in zip(axes, ('seconds', 'peak memory, MB')):
        axis.set(xlabel='minutes of audio', ylabel=unit)
        axis.grid(True, which='both', alpha=0.3)
        axis.legend(fontsize=8, title=f'growth exponent from {GROWTH_FROM_MINUTES} minutes', title_fontsize=8)
    figure.suptitle(f'{title(options)}\n{machine(options)}', fontsize=9)
    save_figure(figure, report_file(options).with_suffix(''))


def machine(options: argparse.Namespace) -> str:
    """Name what the figures were measured with."""
    on_gpu = options.device.startswith('cuda')
    device = torch.cuda.get_device_name() if on_gpu else f'CPU, {options.threads} threads'
    return f"NeMo {version('nemo_toolkit')}, torch {torch.__version__}, {device}"


def title(options: argparse.Namespace) -> str:
    """Name what was measured."""
    what = f'{options.layers} layers' if options.part == 'encoder' else 'attention module'
    passes = 'forward' if options.forward_only else 'forward and backward'
    sizes = f'batch {options.batch_size}, dropout {options.dropout}, sdpa {options.sdpa}'
    return f'{what} of {options.d_model}, {sizes}, {passes}, {options.turns} turns'


def rule(options: argparse.Namespace) -> list[dict]:
    """Measure each kind of attention at lengths around where blocks begin to be faster."""
    kinds = [(positions, sdpa) for positions in (True, False) for sdpa in (False, True)]
    lefts = [int(left) for left in options.contexts if left != HIERARCHICAL]
    rows = []
    for positions, sdpa in tqdm(kinds, desc='kinds of attention', unit='kind'):
        for left in tqdm(lefts, desc='left contexts', leave=False):
            context = AttContext(left, 0)
            for windows in WINDOWS:
                frames = int(windows * AttentionBlocks.cut(Window(context), 10**6).keys)
                kind = dict(part='attention', context=left, frames=frames, positions=positions, sdpa=sdpa)
                runs = {
                    way: build(case_of(options, **kind, stock=way == STOCK)) for way in WAYS
                }  # both in this process
                seconds = in_turn({way: partial(timed, run) for way, run in runs.items()}, options.turns)
                found = ratio(*([run.clock for run in seconds[way]] for way in WAYS))
                auto = wins_by_blocks(Window(context), frames, positions, sdpa)
                rows.append({**kind, 'windows': windows, 'auto': auto, 'ratio': found})
    return rows


def rule_table(rows: list[dict]) -> str:
    """Return frames and speed-up of blocks, a row for each context; bold where auto takes blocks."""
    header = ' | '.join(f'{windows:g} windows' for windows in WINDOWS)
    lines = [f'| attention | left context | {header} |', '| --- | --- |' + ' --- |' * len(WINDOWS)]
    for start in range(0, len(rows), len(WINDOWS)):
        several = rows[start : start + len(WINDOWS)]
        kind = ('rel_pos' if several[0]['positions'] else 'abs_pos') + (', sdpa' if several[0]['sdpa'] else '')
        cells = [f"{row['frames']}: {row['ratio'].median:.2f}" for row in several]
        cells = [f'**{cell}**' if row['auto'] else cell for cell, row in zip(cells, several)]
        lines.append(f"| {kind} | {several[0]['context']} | " + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def blocks(options: argparse.Namespace) -> list[dict]:
    """Measure the attention module with blocks of several lengths, for each context."""
    rows = []
    for left in [int(left) for left in options.contexts if left != HIERARCHICAL]:
        case = case_of(options, part='attention', context=left, frames=LENGTHS_FRAMES, stock=False)

        def run(length: int, case=case):
            with mock.patch.object(blockwise, '_block_frames', lambda window: length):
                return timed(build(case))

        seconds = in_turn({length: partial(run, length) for length in LENGTHS}, options.turns)
        chosen = AttentionBlocks.cut(Window(AttContext(left, 0)), LENGTHS_FRAMES).queries
        rows.append(dict(context=left, chosen=chosen, seconds=seconds))
    return rows


def blocks_table(rows: list[dict]) -> str:
    """Return the median milliseconds of each length of a block, a row for each context."""
    lines = ['| left context | chosen | ' + ' | '.join(f'{length}' for length in LENGTHS) + ' |']
    lines.append('| --- |' + ' ---: |' * (len(LENGTHS) + 1))
    for row in rows:
        cells = [f'{1000 * median_clock(row["seconds"][length]):.1f}' for length in LENGTHS]
        lines.append(f"| {row['context']} | {row['chosen']} | " + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


TABLES = {'rule': rule_table, 'blocks': blocks_table}


def heading(options: argparse.Namespace) -> dict:
    """Return the heading of a report: machine and title."""
    return dict(machine=machine(options), what=title(options))


def report_file(options: argparse.Namespace) -> Path:
    """Return the path of the JSON."""
    return options.output / f'blockwise_{options.part}.json'


def write(results: list[dict], options: argparse.Namespace) -> None:
    """Write JSON and plot, if there is somewhere to."""
    if not options.output:
        return
    options.output.mkdir(parents=True, exist_ok=True)
    fitted = {} if options.part in TABLES else dict(growth=growth(results))
    write_text(report_file(options), json.dumps({**heading(options), 'results': results, **fitted}, indent=2))
    if options.part not in TABLES:
        plot(results, options)


def main(argv=None) -> None:
    """Measure, print and write."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    results = {'rule': rule, 'blocks': blocks}.get(options.part, sweep)(options)
    print('\n'.join(heading(options).values()) + '\n')
    if options.part in TABLES:
        print(TABLES[options.part](results))
        write(results, options)
    else:
        print(table(results) + '\n')
        for name, fitted in growth(results).items():
            print(f"{name}: grows with exponent {fitted['time']:.3f} in time, {fitted['memory']:.3f} in memory")


if __name__ == '__main__':
    main()
