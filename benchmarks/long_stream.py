# SPDX-License-Identifier: Apache-2.0
"""Stream an hour of audio with text: time per chunk and memory, compared with NeMo's streaming.

    python benchmarks/long_stream.py --minutes 60 --nemo-minutes 10
    python benchmarks/long_stream.py --quick

The session computes features and decodes text; NeMo's ``cache_aware_stream_step`` gets computed features and decodes no text.
For ``--nemo-minutes`` the two take turns chunk by chunk, so that other load of the machine affects both. Then a new
session streams ``--minutes`` alone. Weights are random, which does not change the time; a test decoder outputs text at the
rate of speech. ``--quick`` measures text only.
"""

import argparse
import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from measure import timed
from omegaconf import OmegaConf
from streaming_cases import NemoStream, shipped_model
from tqdm import tqdm

from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.streaming.text import LiveText, TextOptions
from nemo.collections.asr.parts.submodules.ctc_decoding import CTCDecoding
from nemo.utils import logging

WINDOW_MINUTES = 5  # of the first and the last minutes that are compared
CLOCKS = {'wall': 0, 'cpu': 1}  # places in what timed() returns
WARM_UP_MINUTES = 1  # until caches are full and memory is allocated
LABELS = [*' abcdefghijklmnopqrstuvwxyz']
SPEECH = 'turn_on_ t_he_ l_i_ghts_ in_ th_e_ k_itchen_ and_ c_all_ ann_a_ at_ nine_ ' + 20 * '_'  # 8 s; _ is blank
FRAME_SECONDS = 0.08
AGES = {'start': 0, '1 minute': 60, '10 minutes': 600, '1 hour': 3600}  # seconds
STEPS = 500  # whose time is measured at each age


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--minutes', type=float, default=60, help='of audio')
    parser.add_argument('--nemo-minutes', type=float, default=10, help='of audio in turns with NeMo')
    parser.add_argument('--config', default='nest_fast-conformer_streaming_tiny', help='in examples/asr/conf/ssl/nest')
    parser.add_argument('--context', type=int, nargs=2, default=[40, 0], metavar=('LEFT', 'RIGHT'))
    parser.add_argument('--quick', action='store_true', help='measure text only')
    parser.add_argument('--output', type=Path, help='a JSON file for the figures')
    return parser.parse_args(argv)


class Speech(torch.nn.Module):
    """A CTC decoder that writes ``SPEECH`` again and again."""

    input_types = {'encoder_output': None}
    num_classes_with_blank = len(LABELS) + 1

    def __init__(self):
        super().__init__()
        classes = torch.tensor([len(LABELS) if label == '_' else LABELS.index(label) for label in SPEECH])
        self.log_probs = torch.nn.functional.one_hot(classes, self.num_classes_with_blank).float().log()
        self.frame = 0

    def forward(self, encoder_output: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities [1, A, C] of the next frames, for encoder frames [1, D, A]."""
        count = encoder_output.shape[2]
        self.frame += count
        return self.log_probs[torch.arange(self.frame - count, self.frame) % len(SPEECH)][None]


def with_speech(model) -> SimpleNamespace:
    """Return preprocessor and encoder of a model with a decoder of text."""
    decoding = CTCDecoding(OmegaConf.create({'strategy': 'greedy'}), LABELS)
    return SimpleNamespace(preprocessor=model.preprocessor, encoder=model.encoder, decoder=Speech(), decoding=decoding)


def text_alone() -> dict[str, float]:
    """Return the microseconds of CPU time that text takes in a step of one frame, at each age of a stream."""
    speech = with_speech(SimpleNamespace(preprocessor=None, encoder=None))
    text, frame, found = LiveText(speech, 1, FRAME_SECONDS, TextOptions()), torch.zeros(1, 8, 1), {}
    for age, seconds in AGES.items():
        while text.streams[0].received * FRAME_SECONDS < seconds:
            text.take(torch.zeros(1, 8, 500), [500], [False])
        times = [timed(lambda: text.take(frame, [1], [False]))[CLOCKS['cpu']] for _ in range(STEPS)]
        found[age] = 1e6 * float(np.mean(times))
    return found


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
    session = StreamingSession(with_speech(model), att_context_size=options.context, return_text=True)
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
        session, StreamingSession(with_speech(model), att_context_size=options.context, return_text=True), minute
    )
    result['words'] = len(session.transcript().words)
    return result


def beside_nemo(options, model, minute: torch.Tensor, chunk: int, chunks: int) -> dict:
    """Time session and NeMo in turns."""
    session = StreamingSession(with_speech(model), att_context_size=options.context, return_text=True)
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
    """Time two sessions in turns for a minute, which begins when the new one is a minute old."""
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
    result = {'text_us_per_step': text_alone()} if options.quick else measure(options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + '\n')


if __name__ == '__main__':
    sys.exit(main())
