# SPDX-License-Identifier: Apache-2.0
"""That losses and scores are those of all log-probabilities is tested in ``test_ssl_models_objectives.py``."""

import torch
from tiny_nest import noise_batch, tiny_model

from nemo.collections.asr.parts.objectives.next_tokens import NextTokens

NEXT = '+model.objective=next_token'


def encoded(model, *seconds):
    """A forward pass, in the default context."""
    return model.encode_batch(noise_batch(seconds), None)


def test_a_pass_without_a_next_token_has_a_loss_of_zero_and_no_scores():
    model = tiny_model(NEXT, 'model.encoder.att_context_size=[4,20]').eval()
    record = encoded(model, 0.5)
    loss, parts = model.objectives.loss(record)
    loss.backward()
    assert loss == 0 and all(part == 0 for part in parts.values())
    assert all(weight.grad is not None for weight in model.next_token_decoders.parameters())
    (scores,) = model.objectives.scores(record).values()
    assert [len(score.targets) for score in scores.values()] == [0] * 4


def test_no_log_probabilities_are_kept_for_the_backward_pass():
    model = tiny_model(NEXT)
    record = encoded(model, 1.0)
    frames = len(model.objectives.find(NextTokens).loss_positions(record).targets)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        model.objectives.loss(record)
    assert kept and not [shape for shape in kept if model.quantizer.num_classes in shape and frames in shape]
