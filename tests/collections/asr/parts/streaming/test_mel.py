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
    st.lists(st.integers(3, AT_ONCE), min_size=1, max_size=6),
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
        step = 0
        while (streams.ring.count < totals).any():
            streams.feed(samples, totals, sizes[step % len(sizes)], staggered, at_most)
            step += 1
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


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_gets_its_preprocessors_features(dtype):
    module = preprocessor(normalize=STATISTICS, window_size=0.025).to(dtype)
    samples = noise(2, 1600)
    expected, _ = module(input_signal=samples, length=torch.tensor([1600, 1600]))
    mel, ring = fed(module, samples, 1600)
    found = mel.frames(ring, all_rows(2), np.zeros(2, np.int64), 10)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected[:, :, :10].transpose(1, 2))


def test_all_happens_on_the_device_and_the_host_waits_for_nothing():
    # a tensor of the meta device has no values to wait for, and mixes with no other device's
    mel = StreamingMel(preprocessor(normalize=STATISTICS).to('meta'))
    ring, samples = mel.new_ring(3, 700), torch.zeros(3, 700, device='meta')
    for lengths in ([700] * 3, [700] * 3, [700, 0, 3]):
        rows = Rows(np.array(lengths) > 0, torch.device('meta'))
        ring.write(rows, rows.select(samples), np.array(lengths)[rows.numbers])
    for first, active in (([0, 0, 0], [True] * 3), ([-3, 0, 2], [True] * 3), ([1, 4], [True, False, True])):
        found = mel.frames(ring, Rows(np.array(active), torch.device('meta')), np.array(first), 8)
        assert found.device.type == 'meta' and found.shape == (len(first), 8, 16)


def with_grads(module):
    module.featurizer.use_grads = True
    return module


def other_forward(module):
    class Other(type(module.featurizer)):
        def forward(self, *args):
            return super().forward(*args)

    module.featurizer.__class__ = Other
    return module


@pytest.mark.parametrize(
    'module, reason',
    [
        (preprocessor(normalize='per_feature'), 'normalize is per_feature, which needs the whole utterance'),
        (preprocessor(normalize='all_features'), 'normalize is all_features, which needs the whole utterance'),
        (preprocessor(exact_pad=True), 'exact_pad is true'),
        (with_grads(preprocessor()), 'use_grads is true'),
        (preprocessor(window='none'), 'window is none'),
        (other_forward(preprocessor()), 'AudioToMelSpectrogramPreprocessor cannot be streamed'),
        (torch.nn.Linear(1, 1), 'Linear cannot be streamed'),
    ],
)
def test_what_cannot_stream_is_refused_with_the_reason(module, reason):
    with pytest.raises(ValueError, match=reason):
        StreamingMel(module)
