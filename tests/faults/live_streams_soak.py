# SPDX-License-Identifier: Apache-2.0
"""Streams that start, end, fail, move and reset at random, for thousands of steps; prints what was found as JSON.

python live_streams_soak.py STEPS
"""

import ctypes
import gc
import json
import random
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from live_streams import noise, offline
from tiny_nest import tiny_model

from nemo.collections.asr.parts.streaming.session import StreamingSession

STREAMS, CONTEXT, RATE = 64, [4, 0], 1000
LONGEST = 6 * RATE  # samples
TINY = (
    'model.encoder.n_layers=1',
    'model.encoder.d_model=8',
    'model.encoder.subsampling_conv_channels=4',
    'model.encoder.subsampling_factor=2',
    'model.quantizer.combine_time_steps=2',
    'model.sample_rate=1000',
    'model.preprocessor.sample_rate=1000',
    'model.preprocessor.window_size=0.04',
    'model.preprocessor.window_stride=0.04',
    'model.preprocessor.n_fft=64',
    'model.preprocessor.features=8',
    'model.num_classes=8',
)
CHECKED = 100  # streams that are compared with offline at once


class Soak:
    """Two sessions whose rows are streams of noise, each from a place in a common recording."""

    def __init__(self):
        self.random, self.model = random.Random(0), tiny_model(*TINY).eval()
        self.recording = noise(1, 40 * RATE, seed=1)[0]
        self.sessions = [StreamingSession(self.model, STREAMS // 2, CONTEXT) for _ in range(2)]
        self.found = dict(ended=0, failed=0, moved=0, reset=0, differ=0, largest=0.0)
        self.streams = [[self.new() for _ in range(STREAMS // 2)] for _ in range(2)]
        self.done: list = []

    def new(self) -> dict:
        """A stream: where it starts, how much of it was fed, how long it will be, and its frames."""
        start, total = self.random.randrange(30 * RATE), self.random.randrange(50, LONGEST)
        return dict(start=start, fed=0, total=total, frames=[], dead=False)

    def step(self, index: int) -> None:
        """Feed some streams of a session; one in a few thousand gets samples that make it fail."""
        session, streams = self.sessions[index], self.streams[index]
        size = self.random.choice([25, 80, 80, 80, 160])
        samples, lengths, ends = torch.zeros(len(streams), size), [], []
        for row, stream in enumerate(streams):
            count = 0 if self.random.random() < 0.1 else min(size, stream['total'] - stream['fed'])
            at = stream['start'] + stream['fed']
            samples[row, :count] = self.recording[at : at + count]
            if count and self.random.random() < 0.0005:
                samples[row, :count] = 1e30
                stream['bad'] = True
            stream['fed'] += count
            lengths.append(count)
            ends.append(stream['fed'] == stream['total'] and not session.ended[row])
        output = session.step(samples, lengths, ends)
        counts, again = output.lengths.tolist(), []
        for row, stream in enumerate(streams):
            if counts[row]:
                stream['frames'].append(output.encoded[row, :, : counts[row]].clone())
            if row in output.failed:
                assert stream.get('bad'), 'a stream failed that was not fed bad samples'
                self.found['failed'] += 1
            elif ends[row]:
                self.found['ended'] += 1
                self.done += [] if stream.get('bad') else [stream]
            elif self.random.random() < 0.002:
                self.found['reset'] += 1
            else:
                continue
            again.append(row)
            streams[row] = self.new()
        session.reset(again)
        if len(self.done) >= CHECKED:
            self.check()

    def move(self) -> None:
        """Exchange two streams of the two sessions."""
        rows = [self.random.randrange(STREAMS // 2) for _ in range(2)]
        states = [session.export(row) for session, row in zip(self.sessions, rows, strict=True)]
        for session, row, state in zip(self.sessions, rows, states[::-1], strict=True):
            session.load(row, state)
        first, second = self.streams
        first[rows[0]], second[rows[1]] = second[rows[1]], first[rows[0]]
        self.found['moved'] += 2

    def check(self) -> None:
        """Compare the streams that are over with offline."""
        lengths = [stream['total'] for stream in self.done]
        samples = torch.zeros(len(lengths), max(lengths))
        for row, stream in enumerate(self.done):
            samples[row, : lengths[row]] = self.recording[stream['start'] : stream['start'] + lengths[row]]
        _, _, encoded, counts, _ = offline(self.model, samples, lengths, CONTEXT)
        for row, (stream, count) in enumerate(zip(self.done, counts.tolist(), strict=True)):
            frames = torch.cat(stream['frames'], dim=1)
            if frames.shape[1] != count:
                self.found['differ'] += 1
                continue
            apart = (frames - encoded[row, :, :count]).abs().max().item()
            self.found['largest'] = max(self.found['largest'], apart)
        self.done = []


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    with open('/proc/self/statm') as statm:
        return int(statm.read().split()[1]) * 4096


def main(steps: int) -> None:
    """Run so many steps of each session, and print what was found."""
    torch.set_num_threads(1)
    soak, memory = Soak(), {}
    for step in range(steps):
        soak.step(step % 2)
        if step % 50 == 49:
            soak.move()
        if step in (steps // 2, steps - 1):
            soak.check()
            memory[step] = resident(), sum(session.cache_bytes_per_stream for session in soak.sessions)
    (middle, cache_middle), (end, cache_end) = memory.values()
    print(json.dumps({**soak.found, 'memory': [middle, end], 'cache': [cache_middle, cache_end]}))


if __name__ == '__main__':
    main(int(sys.argv[1]))
