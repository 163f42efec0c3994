# SPDX-License-Identifier: Apache-2.0
"""Stream an hour of audio through an encoder: time per chunk and memory as it goes, beside NeMo's own streaming.

    python benchmarks/long_stream.py --minutes 60 --nemo_minutes 10

The session starts from samples; NeMo's ``cache_aware_stream_step`` gets its features for nothing, as its API wants
them. For ``--nemo_minutes`` the two take turns chunk by chunk, so that whatever else the machine does hits both; then
a new session streams ``--minutes`` alone. Weights are random: they do not change the time.
"""

import argparse
import json
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from measure import timed
from streaming_cases import NemoStream, shipped_model
from tqdm import tqdm

from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.utils import logging

WINDOW_MINUTES = 5  # of the first and the last minutes that are compared
CLOCKS = {'wall': 0, 'cpu': 1}  # places in what timed() returns
WARM_UP_MINUTES = 1  # until caches are full and memory is allocated


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--minutes', type=float, default=60, help='of audio')
    parser.add_argument('--nemo_minutes', type=float, default=10, help='of audio in turns with NeMo')
    parser.add_argument('--config', default='nest_fast-conformer_streaming_tiny', help='in examples/asr/conf/ssl/nest')
    parser.add_argument('--context', type=int, nargs=2, default=[40, 0], metavar=('LEFT', 'RIGHT'))
    parser.add_argument('--output', type=Path, help='a JSON file for the figures')
    return parser.parse_args(argv)


def resident_mb() -> float:
    """Resident memory of this process now, in MB."""
    try:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
    except FileNotFoundError:  # not Linux: the largest so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return pages * resource.getpagesize() / 2**20


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict:
    """Stream, and return the figures: milliseconds per chunk, MB of memory."""
    model = shipped_model(options.config)
    session = StreamingSession(model, att_context_size=options.context)
    chunk = session.frame_samples * (session.att_context.right + 1)
    per_minute = round(60 * session.sample_rate / chunk)
    minute = torch.randn(1, per_minute * chunk) * 0.1  # the same again and again, so that it takes no memory
    result = {
        'config': options.config,
        'context': options.context,
        'minutes': options.minutes,
        'threads': torch.get_num_threads(),
    }
    if options.nemo_minutes:
        result.update(beside_nemo(options, model, minute, chunk, round(options.nemo_minutes * per_minute)))
    result.update(alone(session, minute, chunk, round(options.minutes * per_minute)))
    result['old_beside_new'] = old_beside_new(
        session, StreamingSession(model, att_context_size=options.context), minute
    )
    return result


def beside_nemo(options, model, minute: torch.Tensor, chunk: int, chunks: int) -> dict:
    """Time session and NeMo in turns."""
    session = StreamingSession(model, att_context_size=options.context)
    nemo = NemoStream(model, options.context, minute)
    per_minute = minute.shape[1] // chunk
    ours, theirs = [], []
    for index in tqdm(range(chunks), desc='session and NeMo', mininterval=5):
        samples = minute[:, index % per_minute * chunk :][:, :chunk]
        ours.append(timed(lambda: session.step(samples)))
        theirs.append(timed(lambda: nemo.step()))
    warm = min(WARM_UP_MINUTES * per_minute, chunks // 2)
    result = {}
    for name, clock in CLOCKS.items():
        mine, nemos = (percentile([times[clock] for times in side[warm:]], 0.5) for side in (ours, theirs))
        result[f'beside_nemo_{name}'] = {'session_p50_ms': mine, 'nemo_p50_ms': nemos, 'session_to_nemo': mine / nemos}
    return result


def alone(session: StreamingSession, minute: torch.Tensor, chunk: int, chunks: int) -> dict:
    """Time the session from its first minute to its last, and watch its memory."""
    per_minute = minute.shape[1] // chunk
    # allocated beforehand: a growing list would look like the session's memory
    seconds, memory = np.zeros((chunks, 2)), []
    for index in tqdm(range(chunks), desc='session', mininterval=5):
        samples = minute[:, index % per_minute * chunk :][:, :chunk]
        seconds[index] = timed(lambda: session.step(samples))
        if index % per_minute == per_minute - 1:
            memory.append({'resident': resident_mb(), 'state': session.cache_bytes_per_stream / 2**20})
    warm = min(WARM_UP_MINUTES * per_minute, chunks // 3)
    window = min(WINDOW_MINUTES * per_minute, (chunks - warm) // 2)
    result = {'memory_mb_after_each_tenth': memory[:: max(len(memory) // 10, 1)] + memory[-1:]}
    for name, clock in CLOCKS.items():
        times = seconds[:, clock].tolist()
        first, last = percentile(times[warm : warm + window], 0.5), percentile(times[-window:], 0.5)
        result[name] = {
            'p50_ms': percentile(times, 0.5),
            'p95_ms': percentile(times, 0.95),
            'p50_first_minutes_ms': first,
            'p50_last_minutes_ms': last,
            'last_to_first': last / first,
            'real_time_factor': sum(times) / (60 * chunks / per_minute),
        }
    return result


def old_beside_new(old: StreamingSession, new: StreamingSession, minute: torch.Tensor) -> dict:
    """Time two sessions in turns for a minute, after a minute of the new one: a busy machine hits both alike."""
    chunk = old.frame_samples * (old.att_context.right + 1)
    new.step(minute)
    times = [
        [timed(lambda: session.step(samples)) for session in (old, new)] for samples in minute.split(chunk, dim=1)
    ]
    result = {}
    for name, clock in CLOCKS.items():
        ages = [percentile([pair[age][clock] for pair in times], 0.5) for age in range(2)]
        result[name] = {'old_p50_ms': ages[0], 'new_p50_ms': ages[1], 'old_to_new': ages[0] / ages[1]}
    return result


def percentile(seconds: list[float], share: float) -> float:
    """A percentile of times in seconds, in milliseconds."""
    return sorted(seconds)[min(int(share * len(seconds)), len(seconds) - 1)] * 1000


def main(argv=None) -> None:
    """Measure, print, write."""
    options = arguments(argv)
    logging.setLevel(logging.ERROR)
    result = measure(options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + '\n')


if __name__ == '__main__':
    sys.exit(main())
