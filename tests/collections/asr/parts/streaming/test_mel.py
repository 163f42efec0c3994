# SPDX-License-Identifier: Apache-2.0
"""The features of many streams, each frame computed once, are those that the preprocessor gives the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_streams import noise

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.streaming.mel import StreamingMel
from nemo.collections.asr.parts.streaming.ring_buffers import Rows

STATISTICS = {'fixed_mean': [-8.0] * 16, 'fixed_std': [3.0] * 16}
SETTINGS = [
    dict(window_size=0.025),
    dict(window_size=0.025, normalize=STATISTICS, pad_to=0),
    dict(preemph=None, n_fft=512, pad_to=7),
    dict(window_size=0.032, window_stride=0.008, window='hamming'),
    dict(sample_rate=8000, n_fft=256, log_zero_guard_type='clamp', log_zero_guard_value='tiny', mag_power=1.0),
    dict(window_size=0.01, window_stride=0.02, log=False, pad_value=3.0),
    dict(mag_power=1.5, n_fft=401, log_zero_guard_value='eps', mel_norm=None),
    dict(frame_splicing=3, normalize={name: values * 3 for name, values in STATISTICS.items()}),
]
AT_ONCE = 1200  # samples
NEW = np.zeros(1, np.int64)


def preprocessor(**chosen):
    return AudioToMelSpectrogramPreprocessor(**{'features': 16, 'normalize': 'NA', **chosen}).eval()


def all_rows(batch, device='cpu'):
    return Rows(np.ones(batch, bool), torch.device(device))


def fed(module, samples, at_once=AT_ONCE):
    """A front end, and a ring with the samples of some streams."""
    mel = StreamingMel(module)
    ring = mel.new_ring(len(samples), at_once)
    ring.write(all_rows(len(samples)), samples, np.full(len(samples), samples.shape[1]))
    return mel, ring


class Streams:
    """Streams in the rows of one ring, as a session keeps them."""

    def __init__(self, module, batch: int):
        self.mel, self.all = StreamingMel(module), np.arange(batch)
        self.ring = self.mel.new_ring(batch, AT_ONCE)

    def reset(self):
        self.ring.count[:] = 0  # what others have left stays in the ring
        self.frames = np.zeros(len(self.all), np.int64)
        self.found = [[] for _ in self.all]

    def feed(self, samples, totals, count: int, staggered: bool, at_most: int):
        """Take some samples of each stream; ``found`` gets the frames."""
        share = count // (1 + self.all % 3) if staggered else count
        received = self.ring.count.copy()
        new = np.minimum(totals - received, share)
        if new.any():
            piece = torch.full((len(self.all), int(new.max())), torch.nan)  # behind a row's own nothing is read
            for row, (start, length) in enumerate(zip(received, new)):
                piece[row, :length] = samples[row, start : start + length]
            rows = Rows(new > 0, torch.device('cpu'))
            self.ring.write(rows, rows.select(piece), new[rows.numbers])
        self.take(self.mel.complete(self.ring.count, self.ring.count == totals), at_most)

    def take(self, complete, at_most: int):
        while (complete > self.frames).any():
            rows = Rows(complete > self.frames, torch.device('cpu'))
            count = min(int((complete - self.frames)[rows.active].min()), at_most)
            found = self.mel.frames(self.ring, rows, self.frames[rows.numbers], count)
            for row, frames in zip(rows.numbers, found):
                if rows.active[row]:
                    self.found[row].append(frames)
            self.frames[rows.active] += count


@settings(max_examples=40)
@given(
    st.sampled_from(SETTINGS),
    st.lists(st.integers(0, 4000), min_size=1, max_size=5),
    st.lists(st.integers(3, AT_ONCE), min_size=1, max_size=12),
    st.booleans(),
    st.integers(1, 9),
)
def test_any_pieces_in_any_phases_give_the_features_of_the_whole(chosen, lengths, sizes, staggered, at_most):
    module, totals = preprocessor(**chosen), np.array(lengths)
    streams = Streams(module, len(lengths))
    for seed in range(2):  # the second time in rows that others have left
        samples = noise(len(lengths), max(max(lengths), 1), seed=seed)
        expected, counts = module(input_signal=samples, length=torch.tensor(lengths))
        streams.reset()
        pieces = iter(sizes)
        while (streams.ring.count < totals).any():
            streams.feed(samples, totals, next(pieces, AT_ONCE), staggered, at_most)
        assert streams.frames.tolist() == counts.tolist()
        for found, whole, count in zip(streams.found, expected, counts):
            if count:
                scale = whole[:, :count].abs().max().item()
                torch.testing.assert_close(torch.cat(found), whole[:, :count].T, atol=2e-6 * scale, rtol=0)


def test_a_frame_comes_as_soon_as_its_window_is_full():
    # 16 kHz, window of 400 samples centred on multiples of 160: frame 0 needs samples up to 199, frame 1 up to 359
    mel, received = StreamingMel(preprocessor(window_size=0.025)), np.arange(401)
    complete = mel.complete(received, np.zeros(401, bool))
    assert np.flatnonzero(np.diff(complete)).tolist() == [199, 359]
    assert mel.complete(received, np.ones(401, bool))[[0, 1, 159, 160, 320]].tolist() == [0, 0, 0, 1, 2]


def test_a_pure_tone_is_as_near_in_the_bands_where_there_is_nothing():
    module, count = preprocessor(window_size=0.025, features=80), 1200
    samples = torch.sin(torch.arange(count) * 0.05)[None] + 1e-5 * noise(1, count)
    expected, _ = module(input_signal=samples, length=torch.tensor([count]))
    mel, ring = fed(module, samples)
    found = mel.frames(ring, all_rows(1), NEW, 6)
    assert expected[0, :, 3].max() - expected[0, :, 3].min() > 15
    torch.testing.assert_close(found[0], expected[0, :, :6].T, atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    'module, reason',
    [
        (preprocessor(normalize='per_feature'), 'normalize is per_feature, which needs the whole utterance'),
        (preprocessor(normalize='all_features'), 'normalize is all_features, which needs the whole utterance'),
        (preprocessor(exact_pad=True), 'exact_pad is true'),
        (preprocessor(window='none'), 'window is none'),
        (torch.nn.Linear(1, 1), 'Linear cannot be streamed'),
    ],
)
def test_what_cannot_stream_is_refused_with_the_reason(module, reason):
    with pytest.raises(ValueError, match=reason):
        StreamingMel(module)
