# SPDX-License-Identifier: Apache-2.0
"""Loss positions, and scores of predictions."""

import pytest
import torch
from tiny_nest import noise_batch, tiny_model

from nemo.collections.asr.losses.ssl_losses.mlm import IGNORED_TARGET, MLMLoss, MultiMLMLoss
from nemo.collections.asr.parts.objectives.base import FrameScores, LossPositions, gather_loss_positions

LOG_PROBS = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()


def test_each_frame_has_its_likelihood_and_whether_it_was_right():
    scores = FrameScores.of(LossPositions(LOG_PROBS, torch.tensor([0, 1]), torch.tensor([0, 3])), MLMLoss())
    torch.testing.assert_close(scores.negative_log_likelihood, -torch.tensor([0.5, 0.1]).log())
    assert scores.correct.tolist() == [1, 0] and scores.utterances.tolist() == [0, 3]


def test_over_several_codebooks_it_is_the_mean():
    log_probs = torch.stack((LOG_PROBS, LOG_PROBS), dim=2)
    predictions = LossPositions(log_probs, torch.tensor([[0, 1], [2, 2]]), torch.tensor([0, 0]))
    scores = FrameScores.of(predictions, MultiMLMLoss(num_decoders=2))
    assert scores.correct.tolist() == [0.5, 1]
    torch.testing.assert_close(scores.negative_log_likelihood[0], -(torch.tensor([0.5, 0.25]).log().mean()))


def test_the_placeholder_of_no_position_has_no_score():
    nothing = LossPositions(LOG_PROBS[:1], torch.tensor([IGNORED_TARGET]), torch.tensor([0]))
    assert [len(part) for part in FrameScores.of(nothing, MLMLoss())] == [0, 0, 0, 0]
    one = nothing._replace(targets=torch.tensor([2]))
    assert [len(part) for part in FrameScores.of(one, MLMLoss())] == [1, 1, 1, 1]


def test_loss_positions_have_their_targets_and_utterances():
    frames, targets = torch.arange(12.0).view(2, 3, 2), torch.arange(6).view(2, 3)
    loss_mask = torch.tensor([[False, True, False], [True, False, True]])
    outputs, aims, utterances = gather_loss_positions(frames, targets, loss_mask)
    assert outputs.tolist() == [[2, 3], [6, 7], [10, 11]]
    assert aims.tolist() == [1, 3, 5] and utterances.tolist() == [0, 1, 1]


@pytest.mark.parametrize('books', [(), (2,)])
def test_without_a_loss_position_there_is_one_without_a_target(books):
    targets = torch.ones(2, 3, *books).long()
    positions = gather_loss_positions(torch.ones(2, 3, 4), targets, torch.zeros(2, 3, dtype=torch.bool))
    assert positions.outputs.shape == (1, 4) and positions.utterances.tolist() == [0]
    assert (positions.targets == IGNORED_TARGET).all() and positions.targets.shape == (1, *books)


@pytest.mark.parametrize(
    ('objective', 'parts'),
    [
        ('masked', {'masked': []}),
        ('next_token', {'next': ['next_0', 'next_1']}),
        ('both', {'masked': [], 'next': ['next_0', 'next_1']}),
    ],
)
def test_losses_are_the_means_of_the_scores(objective, parts):
    model = tiny_model(f'+model.objective={objective}', '+model.next_token.horizons=2').eval()
    assert {each.name: list(each.parts) for each in model.objectives} == parts
    with torch.no_grad(), model.encoder.using_att_context_size([10, 0]):
        record = model.encode_batch(noise_batch((2.0, 1.0)), model.masking_in_context())
        scores = {each.name: found for each, found in model.objectives.scores(record).items()}
        losses = model.objectives.loss(record)
    everything = {
        name: torch.cat([score.negative_log_likelihood for score in found.values()]) for name, found in scores.items()
    }
    everything.update(
        {part: score.negative_log_likelihood for found in scores.values() for part, score in found.items()}
    )
    for name, value in losses.parts.items():
        torch.testing.assert_close(everything[name].mean(), value)
    torch.testing.assert_close(losses.loss, sum(everything[name].mean() for name in parts))
