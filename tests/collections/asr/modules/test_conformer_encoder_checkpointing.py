# SPDX-License-Identifier: Apache-2.0
"""Activations that the backward pass computes again: same loss, same gradients, the context of the pass."""

import pytest
import torch
from tiny_encoder import tiny_encoder
from torch.utils.checkpoint import checkpoint

FRAMES = 40
SETTINGS = dict(att_context_size=[[8, 0], [2, 0], [4, 0], [-1, 0]], dropout=0.3, dropout_att=0.3)


def outputs_and_gradients(encoder, passes=1, run=None):
    """Run one or several forward passes, then one backward pass."""
    torch.manual_seed(0)
    signals = [torch.randn(2, FRAMES, 16) for _ in range(passes)]
    lengths = torch.full((2,), FRAMES)
    run = run or (lambda signal: encoder(audio_signal=signal, length=lengths, bypass_pre_encode=True)[0])
    outputs = [run(signal) for signal in signals]
    sum(output.square().sum() for output in outputs).backward()
    return [*outputs, *(weight.grad for weight in encoder.parameters() if weight.grad is not None)]


@pytest.mark.parametrize('blockwise', ['off', 'on'])
@pytest.mark.parametrize('choice, layers', [('none', []), ('layers', [0, 1, 2, 3]), ('every_2', [0, 2])])
def test_it_changes_no_number_and_recomputes_the_layers_of_the_choice(blockwise, choice, layers):
    settings = dict(SETTINGS, blockwise_attention=blockwise, layer_att_context_size=[[0, [4, 0]], [2, [6, 0]]])
    plain = tiny_encoder(**settings).train()
    encoder = tiny_encoder(**settings, activation_checkpointing=choice).train()
    calls = []
    for index, layer in enumerate(encoder.layers):
        layer.norm_feed_forward1.register_forward_hook(lambda *_, index=index: calls.append(index))
    expected = outputs_and_gradients(plain)
    assert all(map(torch.equal, outputs_and_gradients(encoder), expected))
    assert sorted(calls[len(encoder.layers) :]) == layers


@pytest.mark.parametrize('passes', [1, 2])
@pytest.mark.parametrize('reentrant', [False, True])
def test_a_checkpointed_encoder_recomputes_in_the_context_of_the_pass(passes, reentrant):
    plain, encoder = (tiny_encoder(**SETTINGS).train() for _ in range(2))
    lengths = torch.full((2,), FRAMES)

    def forward(signal):
        return encoder(audio_signal=signal, length=lengths, bypass_pre_encode=True)[0]

    def run(signal):
        return checkpoint(forward, signal.requires_grad_(reentrant), use_reentrant=reentrant)

    expected = outputs_and_gradients(plain, passes)
    assert all(map(torch.equal, outputs_and_gradients(encoder, passes, run), expected))
    assert encoder.draw_att_context_size() == plain.draw_att_context_size()  # as many draws
