# SPDX-License-Identifier: Apache-2.0
import torch
from tiny_encoder import tiny_encoder
from tiny_nest import HIERARCHY, tiny_model

from nemo.collections.asr.parts.att_context.receptive_field import (
    context_table,
    receptive_field,
    seen_through_layers,
)


def test_what_an_output_depends_on_is_what_its_gradient_reaches():
    encoder = tiny_model(*HIERARCHY).encoder.eval()
    frame, contexts = 30, [20, 0]
    seen = seen_through_layers(encoder, frame, contexts)
    field = receptive_field(encoder, contexts)
    assert seen[0] == (frame - field.left, frame + field.right)
    inputs = []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda module, args, kwargs, output: inputs.append(kwargs['x']), with_kwargs=True)
    features = torch.randn(1, 80, 330, requires_grad=True)
    with encoder.using_att_context_size(contexts):
        encoded, _ = encoder(audio_signal=features, length=torch.tensor([330]))
    for (first, last), gradient in zip(seen, torch.autograd.grad(encoded[0, :, frame] @ torch.randn(16), inputs)):
        reached = gradient[0].abs().sum(dim=1).nonzero().flatten()
        assert (max(first, 0), last) == (reached.min(), reached.max())


def test_the_table_tells_contexts_look_ahead_and_receptive_field():
    encoder = tiny_encoder(att_context_size=[[8, 1], [-1, 1]], layer_att_context_size=[[1, [4, 0]], [2, [12, 1]]])
    table = context_table(encoder, 80)
    lines = [line.split('  ') for line in table.splitlines()]
    rows = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines if line[0].isdigit()}
    assert rows['0'] == ['-', '[8, 1] ([640, 80] ms)', '[-1, 1] ([-1, 80] ms)']
    assert rows['1'] == ['[4, 0] ([320, 0] ms)'] * 3
    assert rows['2'][1:] == ['[8, 1] ([640, 80] ms)', '[12, 1] ([960, 80] ms)']
    assert 'total look-ahead' in table and '3 frames (240 ms)' in table and 'unlimited' in table
    # 8 + 4 + 8 + 8 by attention, 4 x 2 by convolution, the frame itself, 3 to come
    assert '40 frames (3200 ms)' in table
