# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Features of many streams, each frame computed once, are those of the preprocessor."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_streams import noise

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.streaming.features import StreamingFeatures
from nemo.collections.asr.parts.streaming.mel import BatchedMel

STATISTICS = {'fixed_mean': [-6.0] * 80, 'fixed_std': [3.0] * 80}
KINDS = {
    'as shipped': dict(window_size=0.025, n_fft=512, features=80, normalize=STATISTICS),
    'power 1, clamped, no preemphasis': dict(
        mag_power=1.0, log_zero_guard_type='clamp', log_zero_guard_value='tiny', preemph=None
    ),
    'whole window, no log': dict(window_size=0.032, n_fft=512, log=False),
}


def front_end(kind: str) -> StreamingFeatures:
    settings = {'normalize': 'NA', 'dither': 0.0, 'pad_to': 0, **KINDS[kind]}
    return StreamingFeatures(AudioToMelSpectrogramPreprocessor(**settings).eval())


@pytest.mark.unit
@settings(max_examples=30)
@given(
    st.sampled_from(list(KINDS)),
    st.lists(st.integers(0, 9000), min_size=1, max_size=3),
    st.lists(st.integers(1, 1500), min_size=1, max_size=4),
)
def test_any_pieces_of_ragged_streams_equal_the_preprocessor(kind, lengths, sizes):
    front = front_end(kind)
    mel, batch = BatchedMel(front, most=1500), len(lengths)
    samples, total = noise(batch, max(max(lengths), 1), seed=sum(lengths)), np.array(lengths)
    expected, counts = front.preprocessor(input_signal=samples, length=torch.tensor(lengths))
    ring, received, done = mel.new_ring(batch), np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    step = 0
    while (received < total).any() or step == 0:
        size = sizes[step % len(sizes)]
        piece = torch.nn.functional.pad(samples, (0, size))
        places = torch.from_numpy(np.minimum(received, samples.shape[1] - 1))[:, None] + torch.arange(size)
        new = np.clip(total - received, 0, size)
        mel.write(ring, piece.gather(1, places), new, received)
        received += new
        complete = mel.complete(received, received == total)
        for row in np.flatnonzero(complete > done):
            rows, first = torch.tensor([row]), done[row : row + 1]
            found = mel.frames(ring, rows, first, int(complete[row] - done[row]), received[row : row + 1])
            close = expected[row, :, done[row] : complete[row]].T
            torch.testing.assert_close(found[0], close, atol=2e-4 if kind.startswith('power') else 2e-5, rtol=1e-5)
        done = np.maximum(complete, done)
        step += 1
    assert done.tolist() == counts.tolist()


@pytest.mark.unit
def test_what_it_does_not_know_is_told():
    assert BatchedMel.why_not(front_end('as shipped').preprocessor.featurizer) is None
    spliced = AudioToMelSpectrogramPreprocessor(frame_splicing=3, normalize='NA').eval()
    assert BatchedMel.why_not(spliced.featurizer) == 'preprocessor.frame_splicing is 3'
