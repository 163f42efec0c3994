# SPDX-License-Identifier: Apache-2.0
"""The features of many streams, each frame computed once, are those that the preprocessor gives the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_streams import noise

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.streaming.features import StreamingFeatures
from nemo.collections.asr.parts.streaming.mel import BatchedMel

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


def mel_of(module, at_once=AT_ONCE):
    return BatchedMel(StreamingFeatures(module), at_once)


class Streams:
    """Streams in the rows of one ring, as a session keeps them."""

    def __init__(self, module, batch: int):
        self.mel, self.all = mel_of(module), np.arange(batch)
        self.ring = self.mel.new_ring(batch)
        self.reset()

    def reset(self):
        self.received, self.frames = np.zeros(len(self.all), np.int64), np.zeros(len(self.all), np.int64)
        self.found = [[] for _ in self.all]

    def feed(self, samples, totals, count: int, staggered: bool, at_most: int):
        """Take some samples of each stream; ``found`` gets the frames."""
        share = count // (1 + self.all % 3) if staggered else count
        new = np.minimum(totals - self.received, share)
        piece = torch.full((len(self.all), max(int(new.max()), 0)), torch.nan)  # nobody may look behind a row's own
        for row, (start, length) in enumerate(zip(self.received, new)):
            piece[row, :length] = samples[row, start : start + length]
        self.mel.write(self.ring, piece, new, self.received)
        self.received = self.received + new
        self.take(self.mel.complete(self.received, self.received == totals), at_most)

    def take(self, complete, at_most: int):
        while (complete > self.frames).any():
            rows = np.flatnonzero(complete > self.frames)
            count = min(int((complete - self.frames)[rows].min()), at_most)
            index = None if len(rows) == len(self.all) else torch.from_numpy(rows)
            found = self.mel.frames(self.ring, index, self.frames[rows], count, self.received[rows])
            for row, frames in zip(rows, found):
                self.found[row].append(frames)
            self.frames[rows] += count


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
        while (streams.received < totals).any():
            streams.feed(samples, totals, sizes[step % len(sizes)], staggered, at_most)
            step += 1
        assert streams.frames.tolist() == counts.tolist()
        for found, whole, count in zip(streams.found, expected, counts):
            if count:
                scale = whole[:, :count].abs().max().item()
                torch.testing.assert_close(torch.cat(found), whole[:, :count].T, atol=2e-6 * scale, rtol=0)


@settings(max_examples=60)
@given(
    st.sampled_from(SETTINGS),
    st.one_of(st.integers(0, 3000), st.integers(0, 20).map(lambda hops: hops * 160)),
    st.booleans(),
)
def test_as_many_frames_are_complete_as_from_a_single_stream(chosen, samples, ended):
    module = preprocessor(**chosen)
    one = StreamingFeatures(module)
    expected = one.step([one.new_tail()], [torch.zeros(samples)], [ended])[0].shape[1]
    assert mel_of(module).complete(np.array([samples]), np.array([ended])).tolist() == [expected]


def test_a_pure_tone_is_as_near_in_the_bands_where_there_is_nothing():
    module, count = preprocessor(window_size=0.025, features=80), 1200
    samples = torch.sin(torch.arange(count) * 0.05)[None] + 1e-5 * noise(1, count)
    expected, _ = module(input_signal=samples, length=torch.tensor([count]))
    mel = mel_of(module)
    ring = mel.new_ring(1)
    mel.write(ring, samples, np.array([count]), NEW)
    found = mel.frames(ring, None, NEW, 6, np.array([count]))
    assert expected[0, :, 3].max() - expected[0, :, 3].min() > 15
    torch.testing.assert_close(found[0], expected[0, :, :6].T, atol=5e-6, rtol=0)


def test_what_another_stream_left_behind_is_not_heard():
    module = preprocessor()
    mel, samples = mel_of(module), noise(1, 400)
    ring = mel.new_ring(1)
    expected, lengths = module(input_signal=samples, length=torch.tensor([400]))
    mel.write(ring, torch.full_like(ring, torch.nan), np.array([ring.shape[1]]), NEW)
    mel.write(ring, samples, np.array([400]), NEW)
    found = mel.frames(ring, None, NEW, int(lengths[0]), np.array([400]))
    torch.testing.assert_close(found[0], expected[0, :, : int(lengths[0])].T, atol=2e-5, rtol=0)


def test_a_row_without_samples_is_left_alone():
    mel = mel_of(preprocessor())
    ring = mel.new_ring(3).fill_(9)
    mel.write(ring, torch.ones(3, 5), np.array([5, 0, 2]), np.zeros(3, np.int64))
    mel.write(ring, torch.full((3, 4), 2.0), np.array([1, 0, 4]), np.array([5, 0, 2]))
    assert ring[:, :7].tolist() == [[1, 1, 1, 1, 1, 2, 9], [9] * 7, [1, 1, 2, 2, 2, 2, 9]]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_gets_its_preprocessors_features(dtype):
    module = preprocessor(normalize=STATISTICS, window_size=0.025).to(dtype)
    samples = noise(2, 1600)
    expected, _ = module(input_signal=samples, length=torch.tensor([1600, 1600]))
    mel = mel_of(module, 1600)
    ring = mel.new_ring(2)
    mel.write(ring, samples, np.array([1600, 1600]), np.zeros(2, np.int64))
    found = mel.frames(ring, None, np.zeros(2, np.int64), 10, np.array([1600, 1600]))
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected[:, :, :10].transpose(1, 2))


def test_autocast_leaves_the_features_in_full_precision():
    mel = mel_of(preprocessor())
    ring = mel.new_ring(1)
    mel.write(ring, noise(1, 1000), np.array([1000]), NEW)
    expected = mel.frames(ring, None, NEW, 5, np.array([1000]))
    with torch.autocast('cpu', torch.bfloat16):
        found = mel.frames(ring, None, NEW, 5, np.array([1000]))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_all_happens_on_the_device_and_the_host_waits_for_nothing():
    # a tensor of the meta device has no values to wait for, and mixes with no other device's
    mel = mel_of(preprocessor(normalize=STATISTICS).to('meta'))
    ring, samples = mel.new_ring(3), torch.zeros(3, 700, device='meta')
    for lengths, received in (([700] * 3, [0] * 3), ([700] * 3, [0, 5, 9]), ([700, 0, 3], [0, 5, 9])):
        mel.write(ring, samples, np.array(lengths), np.array(received))
    rows = torch.zeros(2, dtype=torch.int64, device='meta')
    for first, index in (([0, 0, 0], None), ([-3, 0, 2], None), ([1, 4], rows)):
        found = mel.frames(ring, index, np.array(first), 8, np.full(len(first), 700))
        assert found.device.type == 'meta' and found.shape == (len(first), 8, 16)


def test_what_it_does_not_know_is_told():
    featurizer = preprocessor().featurizer
    assert BatchedMel.why_not(featurizer) is None
    featurizer.use_grads = True
    assert BatchedMel.why_not(featurizer) == 'preprocessor.use_grads is true'
    assert BatchedMel.why_not(preprocessor(window='none').featurizer) == 'preprocessor.window is none'
