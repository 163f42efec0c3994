# SPDX-License-Identifier: Apache-2.0
"""Scores of the frames that count, by part of a model's objective."""

import pytest
import torch
from tiny_nest import noise_batch, tiny_model

from nemo.collections.asr.losses.ssl_losses.mlm import IGNORED_TARGET, MLMLoss, MultiMLMLoss
from nemo.collections.asr.parts.ssl_reports.scores import FrameScores, parts_of, scores_of, without_placeholder
from nemo.collections.asr.parts.utils.masked_frames import MaskedPredictions

LOG_PROBS = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()


def test_each_frame_has_its_likelihood_and_whether_it_was_right():
    scores = FrameScores.of(MaskedPredictions(LOG_PROBS, torch.tensor([0, 1]), torch.tensor([0, 3])), MLMLoss())
    torch.testing.assert_close(scores.negative_log_likelihood, -torch.tensor([0.5, 0.1]).log())
    assert scores.correct.tolist() == [1, 0] and scores.utterances.tolist() == [0, 3]


def test_over_several_codebooks_it_is_the_mean():
    log_probs = torch.stack((LOG_PROBS, LOG_PROBS), dim=2)
    predictions = MaskedPredictions(log_probs, torch.tensor([[0, 1], [2, 2]]), torch.tensor([0, 0]))
    scores = FrameScores.of(predictions, MultiMLMLoss(num_decoders=2))
    assert scores.correct.tolist() == [0.5, 1]
    torch.testing.assert_close(scores.negative_log_likelihood[0], -(torch.tensor([0.5, 0.25]).log().mean()))


def test_the_frame_that_stands_for_none_is_left_out():
    nothing = MaskedPredictions(LOG_PROBS[:1], torch.tensor([IGNORED_TARGET]), torch.tensor([0]))
    assert [len(part) for part in without_placeholder(nothing)] == [0, 0, 0]
    one = nothing._replace(targets=torch.tensor([2]))
    assert [len(part) for part in without_placeholder(one)] == [1, 1, 1]


@pytest.mark.parametrize(
    ('objective', 'parts'),
    [
        ('masked', ['masked']),
        ('next_token', ['next_0', 'next_1']),
        ('both', ['masked', 'next_0', 'next_1']),
    ],
)
def test_the_parts_are_those_of_the_objective(objective, parts):
    model = tiny_model(f'+model.objective={objective}', '+model.next_token.horizons=2').eval()
    assert parts_of(model) == parts
    with torch.no_grad(), model.encoder.using_att_context_size([10, 0]):
        record = model.encode_batch(noise_batch((2.0, 1.0)), model._own_masking())
        scores = scores_of(model, record)
        losses = model.losses_of(record)
    assert list(scores) == parts
    for name, value in losses.parts.items():
        torch.testing.assert_close(scores[name].negative_log_likelihood.mean(), value)
