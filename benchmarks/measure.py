# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: runs in turn, ratios with their spread, peak memory, growth exponents.

Imports nothing of NeMo, so that a case can be built by stock NeMo too, in a process with the overlay off.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from tqdm import tqdm

MEGABYTE = 1e6
COPIED = 2**26  # bytes, more than a cache holds
# For a process: glibc returns what is freed, or peaks show what earlier parts of a run have long given up.
GIVE_BACK = {'MALLOC_MMAP_THRESHOLD_': str(2**20)}


class Seconds(NamedTuple):
    """How long a run took; CPU time, of all threads, leaves out what others do on the same machine."""

    clock: float
    cpu: float


class Ratio(NamedTuple):
    """The median of the pairs' ratios, and its quartiles."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f'{self.median:.3f} ({self.low:.3f} to {self.high:.3f})'


class Quick(argparse.Action):
    """The option ``--quick``: sets the other options to one small case of seconds."""

    def __init__(self, option_strings, dest, small: Mapping = MappingProxyType({}), **settings):
        super().__init__(option_strings, dest, nargs=0, default=False, help='one small case, to see that it runs')
        self.small = small

    def __call__(self, parser, namespace, values, option_string=None):
        """Set the options; those that come later on the command line win."""
        vars(namespace).update({self.dest: True, **self.small})


def timed(run: Callable[[], object], at_least: float = 0.0) -> Seconds:
    """Return the seconds of a run until the device has finished: medians of runs that are as long.

    One run of a few milliseconds is not enough: threads of the process that ran before may still be spinning.
    """
    runs, until = [], time.perf_counter() + at_least
    once = _once_on_a_gpu if gpu_is_in_use() else _once
    while not runs or time.perf_counter() < until:
        runs.append(once(run))
    return Seconds(*map(statistics.median, zip(*runs)))


def _once(run: Callable[[], object]) -> Seconds:
    start = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - start[0], time.process_time() - start[1])


def _once_on_a_gpu(run: Callable[[], object]) -> Seconds:
    """Time a run by the GPU's own clock, from an idle GPU on."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.process_time()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return Seconds(begin.elapsed_time(end) / 1000, time.process_time() - start)


def wait_for_device() -> None:
    """Wait for a GPU to finish, where there is one in use."""
    if gpu_is_in_use():
        torch.cuda.synchronize()


def gpu_is_in_use() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def in_turn(runs: dict, turns: int, what: str = 'turns') -> dict[str, list[Seconds]]:
    """Time several things in turn, in changing order, after one run of each to warm up.

    Whatever else the machine does then hits all of them.

    Args:
        runs: by name, what takes a turn and returns its :class:`Seconds`.
        turns: how many each has.
        what: the text beside the bar.
    """
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for turn in tqdm(range(turns), desc=what, unit='turn', leave=False):
        for name in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            seconds[name].append(runs[name]())
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Compare runs that took turns: the ratios ``above[i] / below[i]``."""
    ratios = [first / second for first, second in zip(above, below)]
    return Ratio(*(statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3))


def machine_rates(device: str = 'cpu') -> dict:
    """A device's rates: operations of a float32 matrix product, and bytes copied, each in a second."""
    size = 2048
    matrix, source = torch.randn(size, size, device=device), torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(timed(lambda: matrix @ matrix).clock for _ in range(5))
    copy = min(timed(lambda: target.copy_(source)).clock for _ in range(5))
    return {'operations_per_second': 2 * size**3 / product, 'bytes_per_second': 2 * COPIED / copy}


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit values = constant x size ** exponent by least squares on log axes, and return the exponent."""
    x, y = ([math.log(value) for value in column] for column in (sizes, values))
    return statistics.linear_regression(x, y).slope


def peak_memory(run: Callable[[], object]) -> float:
    """Return how many megabytes a run takes at its peak, beyond what the process (or the GPU) held before.

    Raises:
        OSError: if the system does not report it (only Linux does, for CPU memory).
    """
    if gpu_is_in_use():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MEGABYTE
    give_back_memory()  # or what was freed before hides what the run needs
    Path('/proc/self/clear_refs').write_text('5')  # the peak so far is forgotten
    before = _resident('VmRSS')
    run()
    return (_resident('VmHWM') - before) / MEGABYTE


def give_back_memory() -> None:
    """Return freed memory to the system, where glibc keeps it."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> float:
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024


class CaseProcess:
    """A process that builds a case and runs it on request, with or without the overlay; see :func:`serve`.

    Args:
        script: calls :func:`serve`.
        case: what to build; JSON must be able to hold it.
        stock: whether the overlay is off.
        environment: further variables, such as ``GIVE_BACK`` for memory (it takes time).
        python: the interpreter, of another environment than this one's.

    Raises:
        RuntimeError: by its methods, if the process has ended; the message has the end of its output.
    """

    def __init__(
        self,
        script: Path,
        case: dict,
        stock: bool,
        environment: Mapping[str, str] = MappingProxyType({}),
        python: str = sys.executable,
    ):
        self._messages = tempfile.TemporaryFile('w+')
        self._process = subprocess.Popen(
            [python, str(script), json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env={**os.environ, 'NEMO_STREAMING_SSL': '0' if stock else '1', **environment},
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def run(self, at_least: float = 0.0) -> Seconds:
        """Time the case; see :func:`timed`."""
        return Seconds(*self._ask(f'run {at_least}'))

    def peak(self) -> float:
        """Run the case once and return its peak memory in megabytes."""
        return self._ask('peak')

    def about(self) -> dict:
        """Return what the script reports about the case."""
        return self._ask('about')

    def _ask(self, what: str):
        self._process.stdin.write(what + '\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._messages.seek(0)
        raise RuntimeError(f'a benchmark process ended ({self._process.wait()}):\n' + self._messages.read()[-2000:])


def serve(build: Callable[[dict], Callable[[], object]], about: Callable[[Callable], dict] = lambda run: {}) -> None:
    """Build the case that the command line holds and answer a :class:`CaseProcess` until it stops asking.

    Args:
        build: returns what runs a case.
        about: describes it, in types that JSON has.
    """
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)  # NeMo logs to standard output
    run = build(json.loads(sys.argv[1]))
    asked = {
        'run': lambda seconds: timed(run, float(seconds)),
        'peak': lambda: peak_memory(run),
        'about': lambda: about(run),
    }
    for line in sys.stdin:
        what, *arguments = line.split()
        print(json.dumps(asked[what](*arguments)), file=answers)
        give_back_memory()  # the other process may need it
