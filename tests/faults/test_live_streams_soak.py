# SPDX-License-Identifier: Apache-2.0
"""64 live streams that start, end, fail, move and reset at random for 20,000 steps equal offline, in bounded memory.

As a script it does so in a process of its own, and prints what was found as JSON.
"""

import ctypes
import gc
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fresh_process import run_python
from live_streams import noise, offline
from tiny_nest import tiny_model

from nemo.collections.asr.parts.streaming.session import StreamingSession

STEPS, STREAMS, CONTEXT, RATE = 20000, 64, [4, 0], 1000
ENCODER = 'n_layers=1', 'd_model=8', 'subsampling_conv_channels=4', 'subsampling_factor=2'
FEATURES = 'sample_rate=1000', 'window_size=0.04', 'window_stride=0.04', 'n_fft=64', 'features=8'
OTHERS = 'quantizer.combine_time_steps=2', 'sample_rate=1000', 'num_classes=8'
CHECKED, AT_ONCE = 400, 50  # streams that are compared with offline, so many of like length in a batch


class Soak:
    """Two sessions whose rows are streams of noise, each from a place in a common recording."""

    def __init__(self):
        overrides = *(f'encoder.{each}' for each in ENCODER), *(f'preprocessor.{each}' for each in FEATURES), *OTHERS
        self.random, self.model = random.Random(0), tiny_model(*(f'model.{each}' for each in overrides)).eval()
        self.recording = noise(1, 40 * RATE, seed=1)[0].numpy()
        self.sessions = [StreamingSession(self.model, STREAMS // 2, CONTEXT) for _ in range(2)]
        self.found = dict(ended=0, failed=0, moved=0, reset=0, largest=0.0)
        self.streams = [[self.new() for _ in range(STREAMS // 2)] for _ in range(2)]
        self.done = []

    def new(self) -> dict:
        """A stream: where it starts, how much of it was fed, how long it will be, and its frames."""
        start, total = self.random.randrange(30 * RATE), self.random.randrange(50, 6 * RATE)
        return dict(start=start, fed=0, total=total, frames=[], bad=False)

    def step(self, index: int) -> None:
        """Feed some streams of a session; one in a few thousand gets samples that make it fail."""
        session, streams = self.sessions[index], self.streams[index]
        size = self.random.choice([25, 80, 80, 80, 160])
        samples, lengths, ends = np.zeros((len(streams), size), np.float32), [], []
        for row, stream in enumerate(streams):
            count = 0 if self.random.random() < 0.1 else min(size, stream['total'] - stream['fed'])
            at = stream['start'] + stream['fed']
            samples[row, :count] = self.recording[at : at + count]
            if count and self.random.random() < 0.0005:
                samples[row, :count], stream['bad'] = 1e30, True
            stream['fed'] += count
            lengths.append(count)
            ends.append(stream['fed'] == stream['total'] and not session.ended[row])
        output = session.step(torch.from_numpy(samples), lengths, ends)
        encoded = output.encoded.numpy()
        over = {row: 'ended' for row, end in enumerate(ends) if end} | dict.fromkeys(output.failed, 'failed')
        for row, (stream, count) in enumerate(zip(streams, output.lengths.tolist(), strict=True)):
            if count:
                stream['frames'].append(encoded[row, :, :count])
            if row not in over and self.random.random() < 0.002:
                over[row] = 'reset'
        for row, why in over.items():
            self.found[why] += 1
            assert streams[row]['bad'] or why != 'failed', 'a stream failed that was not fed bad samples'
            self.done += [streams[row]] if why == 'ended' and not streams[row]['bad'] else []
            streams[row] = self.new()
        session.reset([*over])

    def move(self) -> None:
        """Exchange two streams of the two sessions."""
        (first, second), rows = self.streams, [self.random.randrange(STREAMS // 2) for _ in range(2)]
        states = [session.export(row) for session, row in zip(self.sessions, rows, strict=True)]
        for session, row, state in zip(self.sessions, rows, states[::-1], strict=True):
            session.load(row, state)
        first[rows[0]], second[rows[1]] = second[rows[1]], first[rows[0]]
        self.found['moved'] += 2

    def check(self) -> None:
        """Compare the streams that are over with offline."""
        self.done.sort(key=lambda stream: stream['total'])
        for first in range(0, len(self.done), AT_ONCE):
            streams = self.done[first : first + AT_ONCE]
            lengths = [stream['total'] for stream in streams]
            samples = [torch.from_numpy(self.recording[stream['start'] :][: stream['total']]) for stream in streams]
            samples = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
            _, _, encoded, counts, _ = offline(self.model, samples, lengths, CONTEXT)
            for stream, whole, count in zip(streams, encoded.numpy(), counts.tolist(), strict=True):
                frames = np.concatenate(stream['frames'], axis=1)
                assert frames.shape[1] == count
                self.found['largest'] = max(self.found['largest'], np.abs(frames - whole[:, :count]).max().item())
        self.done = []

    def memory(self) -> tuple[int, int]:
        """Return the resident memory of this process and the bytes of the sessions."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
        resident = int(Path('/proc/self/statm').read_text().split()[1]) * 4096
        return resident, sum(session.cache_bytes_per_stream for session in self.sessions)


def main() -> None:
    torch.set_num_threads(1)
    soak, memory = Soak(), []
    for step in range(STEPS):
        soak.step(step % 2)
        if step % 50 == 49:
            soak.move()
        at_mark = step in (STEPS // 2, STEPS - 1)
        if soak.done and (at_mark or len(soak.done) >= CHECKED):
            soak.check()
        if at_mark:
            memory.append(soak.memory())
    print(json.dumps({**soak.found, 'memory': memory}))


@pytest.mark.integration
def test_streams_stay_exact_and_memory_stays_where_it_was():
    done = run_python(Path(__file__))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['largest'] < 1e-4
    assert min(found['ended'], found['failed'], found['moved'], found['reset']) > 100, found
    (middle, cache_middle), (end, cache_end) = found['memory']
    assert end < middle * 1.02 + 4e6 and cache_end == cache_middle, found


if __name__ == '__main__':
    main()
