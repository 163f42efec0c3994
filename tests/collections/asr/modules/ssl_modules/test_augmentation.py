# SPDX-License-Identifier: Apache-2.0
"""Noise is mixed as NeMo does it, with segments of the same distribution."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_nest import noise_batch

from nemo.collections.asr.modules.ssl_modules import MultiSpeakerNoiseAugmentation
from nemo.collections.asr.modules.ssl_modules.augmentation import SegmentDraws

DRAWS = 5000


def lengths_of_nemo(segments, samples):
    return tuple(Counter(random.choices(range(segments), k=samples)).values())


@pytest.mark.parametrize('segments, samples', [(2, 3), (3, 4), (4, 2)])
def test_segments_have_the_lengths_that_nemo_would_draw(segments, samples):
    """All outcomes are so few that each share can be compared, the order of the lengths included."""
    random.seed(0)
    ours = Counter(tuple(SegmentDraws(segments, samples).counts().values()) for _ in range(DRAWS))
    nemo = Counter(lengths_of_nemo(segments, samples) for _ in range(DRAWS))
    assert set(ours) == set(nemo)
    for outcome, count in nemo.items():
        spread = 5 * np.sqrt(count * (1 - count / DRAWS) * 2)
        assert abs(ours[outcome] - count) < spread, outcome


@pytest.mark.parametrize('noise_ratio', [0.0, 1.0])
@pytest.mark.parametrize('segments', [1, 4])
def test_noise_is_mixed_at_the_ratio_asked_for(noise_ratio, segments):
    augment = MultiSpeakerNoiseAugmentation(
        prob=1.0,
        noise_ratio=noise_ratio,
        min_r_speech=3.0,
        max_r_speech=3.0,
        min_r_noise=3.0,
        max_r_noise=3.0,
        min_mix_rate=0.5,
        max_mix_rate=0.5,
        min_num_segments=segments,
        max_num_segments=segments,
        min_num_speakers=1,
        max_num_speakers=2,
    )
    random.seed(0)
    batch = noise_batch((1.0, 0.6, 0.8))
    clean = batch.audio.clone()
    mixed = augment(batch)
    assert torch.equal(mixed.audio, clean)
    for noisy, audio, length in zip(mixed.noisy_audio, clean, mixed.audio_len):
        added = (noisy - audio)[:length]
        ratio = 10 * torch.log10(audio[:length].square().sum() / added.square().sum())
        assert ratio.item() == pytest.approx(3.0, abs=0.01)
        assert 0.4 * length < (added != 0).sum() <= 0.5 * length + 1
