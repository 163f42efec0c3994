# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.streaming.features import StreamingFeatures

STATISTICS = {'fixed_mean': [-8.0] * 16, 'fixed_std': [3.0] * 16}
SETTINGS = [
    dict(),
    dict(normalize=STATISTICS, pad_to=0),
    dict(preemph=None, n_fft=512, pad_to=7),
    dict(window_size=0.032, window_stride=0.008, window='hamming'),
    dict(sample_rate=8000, n_fft=256, log_zero_guard_type='clamp', log_zero_guard_value=1e-5, mag_power=1.0),
    dict(window_size=0.01, window_stride=0.02, log=False, pad_value=3.0),
]


def preprocessor(**settings):
    return AudioToMelSpectrogramPreprocessor(**{'features': 16, 'normalize': 'NA', **settings}).eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cumsum(dim=-1) * 0.01


@settings(max_examples=25)
@given(
    st.sampled_from(SETTINGS),
    st.lists(st.integers(1, 4000), min_size=1, max_size=3),
    st.lists(st.integers(1, 700), min_size=1, max_size=8),
)
def test_any_pieces_give_the_features_of_the_whole(chosen, lengths, sizes):
    module = preprocessor(**chosen)
    samples = noise(len(lengths), max(lengths))
    expected, expected_lengths = module(input_signal=samples, length=torch.tensor(lengths))

    front_end = StreamingFeatures(module)
    tails = [front_end.new_tail() for _ in lengths]
    streamed = [[] for _ in lengths]
    position = 0
    while position < max(lengths):
        size = sizes[position % len(sizes)]
        pieces = [row[:length][position : position + size] for row, length in zip(samples, lengths)]
        ended = [position < length <= position + size for length in lengths]
        for frames, new in zip(streamed, front_end.step(tails, pieces, ended)):
            frames.append(new)
        position += size

    for row, frames in enumerate(streamed):
        frames = torch.cat(frames, dim=1)
        assert frames.shape[1] == expected_lengths[row]
        torch.testing.assert_close(frames, expected[row, :, : frames.shape[1]], atol=1e-5, rtol=0)


def test_a_frame_comes_as_soon_as_its_window_is_full():
    # 16 kHz, window of 400 samples centred on multiples of 160: frame 0 needs samples up to 199, frame 1 up to 359
    front_end = StreamingFeatures(preprocessor(window_size=0.025))
    tails = [front_end.new_tail()]
    arrived = [front_end.step(tails, [sample], [False])[0].shape[1] for sample in noise(400).split(1)]
    assert [index for index, count in enumerate(arrived) if count] == [199, 359]


@pytest.mark.parametrize(
    'chosen, reason',
    [
        (dict(normalize='per_feature'), 'normalize is per_feature, which needs the whole utterance'),
        (dict(normalize='all_features'), 'normalize is all_features, which needs the whole utterance'),
        (dict(exact_pad=True), 'exact_pad is true'),
    ],
)
def test_what_cannot_stream_is_refused_with_the_reason(chosen, reason):
    with pytest.raises(ValueError, match=reason):
        StreamingFeatures(preprocessor(**chosen))


def test_another_preprocessor_is_refused():
    with pytest.raises(ValueError, match='Linear cannot be streamed'):
        StreamingFeatures(torch.nn.Linear(1, 1))
