# SPDX-License-Identifier: Apache-2.0
"""Compare live streams with NeMo's own loop: speed-up, mixed phases, idle slots, streams per core.

    OMP_NUM_THREADS=1 python benchmarks/streaming.py --json streams.json --plot docs/pictures/streaming.png
    python benchmarks/streaming.py --quick                       # two small cases, to see that it runs
    python benchmarks/streaming.py --only "17 x 512" --profile   # and where the time goes

Chunks have 80 ms; weights are random, which does not change the time. Sessions compute features; NeMo's
``cache_aware_stream_step`` gets computed features, and all of its streams end their chunks at the same time. Times are CPU
times of all threads; ratios are medians over the turns with their quartiles. Real-time streams per core are the streams
times 80 ms divided by the time of a step. The bound of a step is the larger of two times on this machine: reading all
weights once, and computing all products.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from measure import Ratio, in_turn, machine_rates, ratio, timed
from streaming_cases import SIZES, NemoStream, SessionStream, model_of_size

from nemo.utils import logging
from nemo.utils.atomic_files import replacing, write_text

CHUNK_MS = 80
FILLED = 8  # chunks after the caches are full before anything is timed
TURN_SECONDS = 0.1  # steps that take less are repeated within a turn
SAMPLES = 40  # chunks of audio that come again and again
PARTS = {  # of the profile: the functions that a part is all of
    'mel': ('batch_runner.py', '_take'),
    'subsampling': ('batch_runner.py', '_subsample'),
    'layers': ('layers.py', 'step'),
    'what is seen': ('ring_buffers.py', 'visible'),
}


class Case(NamedTuple):
    """What is run."""

    size: str
    streams: int
    left: int
    frames: int = 1
    """Of 80 ms in a chunk; NeMo's loop is left out where there are more than one."""


CASES = [
    *(Case(size, 1, left) for size in ('tiny', '17 x 512') for left in (10, 40, 80, 320)),
    *(Case('8 x 512', 32, left) for left in (40, 80)),
    *(Case(size, streams, 40) for size in ('tiny', '8 x 256') for streams in (8, 32, 128)),
    Case('8 x 256', 1, 40),
    Case('17 x 512', 8, 80),
    *(Case(size, 1, 40, 4) for size in ('tiny', '17 x 512')),
    *(Case(size, 32, 40, 25) for size in ('tiny', '8 x 256')),  # a backlog of 2 seconds
]
QUICK = [Case('tiny', 1, 10), Case('tiny', 4, 10)]


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--turns', type=int, default=11, help='timed steps of each case')
    parser.add_argument('--only', choices=list(SIZES), help='one size of model')
    parser.add_argument('--quick', action='store_true', help='two small cases, to see that it runs')
    parser.add_argument('--profile', action='store_true', help='print the share of each part of a session')
    parser.add_argument('--json', type=Path, help='write the figures to this file')
    parser.add_argument('--plot', type=Path, help='draw the streams per core to this file')
    options = parser.parse_args(argv)
    if options.turns < 2:
        parser.error('--turns must be 2 or more: a ratio needs its spread')
    return options


def runs_of(case: Case, model) -> dict:
    """Return what takes turns in a case, by name, their caches filled."""
    samples = torch.randn(case.streams, SAMPLES * CHUNK_MS * 16, generator=torch.Generator().manual_seed(0)) * 0.1
    session = partial(SessionStream, model, [case.left, 0], samples, case.frames)
    runs = {'session': session()}
    if case.streams > 1:
        runs['mixed phases'], runs['idle slot'] = session(mixed=True), session(idle=True)
    if case.frames == 1:
        runs['nemo'] = NemoStream(model, [case.left, 0], samples)
    for name, run in runs.items():
        steps = FILLED + (case.left // case.frames if name != 'nemo' else 0)  # its cache has its size from the start
        for _ in range(steps):
            run.step()
    return runs


def measure(case: Case, turns: int, rates: dict, profiled: bool = False) -> dict:
    """Time a case; returns its figures."""
    model = model_of_size(case.size)
    runs = runs_of(case, model)
    name = f'{case.size}, {case.streams} streams, left {case.left}'
    found = in_turn({name: partial(timed, run.step, TURN_SECONDS) for name, run in runs.items()}, turns, name)
    cpu = {run: [seconds.cpu for seconds in each] for run, each in found.items()}
    result = {**case._asdict(), 'ms': {run: 1000 * statistics.median(times) for run, times in cpu.items()}}
    result['times_faster'] = {run: ratio(times, cpu['session'])._asdict() for run, times in cpu.items()}
    per_frame = {run: ms / case.frames for run, ms in result['ms'].items()}
    result['streams_per_core'] = {run: case.streams * CHUNK_MS / ms for run, ms in per_frame.items()}
    result['bound_ms'] = bound_ms(model, case, rates)
    result['state_bytes'] = runs['session'].session.cache_bytes_per_stream
    if profiled:
        result['profile'] = profile(runs['session'])
    return result


def bound_ms(model, case: Case, rates: dict) -> float:
    """Return the least milliseconds of a step: those of reading the weights, or of computing with them."""
    weights = sum(parameter.numel() for layer in model.encoder.layers for parameter in layer.parameters())
    reading = 4 * weights / rates['bytes_per_second']
    computing = 2 * weights * case.streams * case.frames / rates['operations_per_second']
    return 1000 * max(reading, computing)


def profile(run: SessionStream) -> dict[str, float]:
    """Return the share of a session's time that each part takes, by Python's profiler."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(20):
        run.step()
    profiler.disable()
    stats = pstats.Stats(profiler).stats
    whole = sum(own for _, _, own, _, _ in stats.values())
    cumulative = {(Path(file).name, function): total for (file, _, function), (_, _, _, total, _) in stats.items()}
    shares = {part: cumulative.get(function, 0.0) / whole for part, function in PARTS.items()}
    shares['the rest'] = 1 - sum(shares.values())
    in_python = sum(own for (file, _, _), (_, _, own, _, _) in stats.items() if file != '~')
    return {**shares, 'Python itself, of all parts': in_python / whole}


def table(results: list[dict]) -> str:
    """Lay the figures out as Markdown."""
    head = '| model | streams | left context | frames | session, ms | speed-up over NeMo | mixed phases | idle slot |'
    rows = [head + ' bound, ms | real-time streams per core |', '| --- |' + ' ---: |' * 9]
    for found in results:
        faster = {name: Ratio(**values) for name, values in found['times_faster'].items()}
        cells = [found['size'], found['streams'], found['left'], found['frames'], f"{found['ms']['session']:.2f}"]
        cells.append(_times(faster.get('nemo')))
        cells += [
            f'{faster[name].median:.2f} x the time' if name in faster else '-'
            for name in ('mixed phases', 'idle slot')
        ]
        cells += [f"{found['bound_ms']:.2f}", f"{found['streams_per_core']['session']:.1f}"]
        rows.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(rows)


def _times(faster) -> str:
    return '-' if faster is None else f'{faster.median:.2f} x ({faster.low:.2f} to {faster.high:.2f})'


def plot(results: list[dict], path: Path) -> None:
    """Draw the streams per core over the number of streams, a line for each size and way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout='constrained')
    axis = figure.subplots()
    for number, size in enumerate(dict.fromkeys(found['size'] for found in results)):
        own = sorted(
            (
                found
                for found in results
                if found['size'] == size and found['left'] in (40, 80) and found['frames'] == 1
            ),
            key=lambda found: found['streams'],
        )
        for way, style in (('session', '-'), ('mixed phases', ':'), ('nemo', '--')):
            points = [(found['streams'], found['streams_per_core'][way]) for found in own if way in found['ms']]
            if points:
                axis.plot(*zip(*points), style, marker='o', ms=4, color=f'C{number}', label=f'{size}, {way}')
    axis.set(xscale='log', yscale='log', xlabel='streams in a session', ylabel='real-time streams per core')
    figure.legend(fontsize=7, loc='outside right upper', frameon=False)
    axis.grid(alpha=0.3)
    with replacing(path) as partial_file:
        figure.savefig(partial_file, dpi=120, format='png', metadata={'Software': None})


def main(argv=None) -> None:
    """Time, and print the table."""
    options = arguments(argv)
    logging.setLevel(logging.ERROR)
    rates = machine_rates()
    cases = [case for case in (QUICK if options.quick else CASES) if options.only in (None, case.size)]
    results = [measure(case, options.turns, rates, options.profile) for case in cases]
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    print(table(results))
    for found in results if options.profile else ():
        shares = ', '.join(f'{part} {share:.0%}' for part, share in found['profile'].items())
        print(f"{found['size']}, {found['streams']} streams, left {found['left']}: {shares}")
    if options.json:
        write_text(options.json, json.dumps({'rates': rates, 'cases': results}, indent=1) + '\n')
    if options.plot:
        plot(results, options.plot)


if __name__ == '__main__':
    main()
