# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny_encoder import tiny_encoder
from tiny_nest import HIERARCHY, tiny_model

from nemo.collections.asr.parts.att_context.receptive_field import (
    _features_ahead,
    context_table,
    next_token_offset,
    receptive_field,
    seen_through_layers,
    why_no_next_token,
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


def encoder(**changes):
    return tiny_encoder(**{'n_layers': 2, 'att_context_size': [4, 0], **changes})


@pytest.mark.parametrize(
    ('changes', 'offset', 'after'),
    [
        ({}, 0, 1),
        ({'att_context_size': [-1, 0]}, 0, 1),
        ({'att_context_size': [4, 2]}, 4, 5),  # two layers, two frames each
        ({'att_context_style': 'chunked_limited', 'att_context_size': [8, 3]}, 3, 4),
        ({'att_context_style': 'chunked_limited', 'att_context_size': [-1, 3]}, 3, 4),
        ({'layer_att_context_size': [[4, 1], [4, 0]], 'att_context_size': [4, 2]}, 1, 2),
        ({'conv_context_size': [1, 1]}, 2, 3),
        ({'causal_downsampling': False}, 1, 1),
        ({'causal_downsampling': False, 'att_context_size': [4, 1]}, 3, 3),
        ({'subsampling': 'striding'}, 0, 1),
        ({'subsampling': 'stacking'}, 1, 1),
        ({'subsampling_factor': 4}, 0, 1),
        ({'subsampling_factor': 1}, 0, 1),
        ({'conv_norm_type': 'fused_batch_norm'}, 0, 1),
    ],
)
def test_offset(changes, offset, after):
    made = encoder(**changes)
    assert next_token_offset(made, after_subsampling=False) == offset
    assert next_token_offset(made, after_subsampling=True) == after


@pytest.mark.parametrize('subsampling', ['dw_striding', 'striding', 'stacking'])
@pytest.mark.parametrize('factor', [2, 4, 8])
@pytest.mark.parametrize('causal', [True, False])
def test_the_subsampling_looks_as_far_ahead_as_its_gradient_reaches(subsampling, factor, causal):
    made = encoder(subsampling=subsampling, subsampling_factor=factor, causal_downsampling=causal)
    for weight in made.pre_encode.parameters():
        weight.data.abs_()  # no activation hides a feature
    features = torch.rand(1, 8 * factor, 8, requires_grad=True)
    frames, _ = made.pre_encode(x=features, lengths=torch.tensor([8 * factor]))
    frames[0, 3].square().sum().backward()
    last = int(features.grad[0].abs().sum(dim=1).nonzero().max())
    assert last == factor * 3 + _features_ahead(made)


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'att_context_size': [4, -1]}, r'att_context_size \[4, -1\] the receptive field is the whole utterance'),
        ({'att_context_size': [-1, -1]}, 'the receptive field is the whole utterance'),
        ({'conv_norm_type': 'batch_norm'}, 'conv_norm_type is batch_norm.*use layer_norm'),
        ({'self_attention_model': 'rel_pos_local_attn', 'att_context_size': [4, 4]}, 'rel_pos_local_attn'),
        ({'subsampling': 'vggnet', 'subsampling_factor': 4}, 'look-ahead of encoder.subsampling is not known'),
        (
            {'reduction': 'pooling', 'reduction_position': 0, 'reduction_factor': 2, 'causal_downsampling': False},
            'encoder.reduction',
        ),
        ({'att_context_style': 'chunked_limited_with_rc', 'att_context_size': [4, 0]}, 'windows are not known'),
    ],
)
def test_an_encoder_that_may_hear_its_next_tokens_is_refused(changes, reason):
    try:
        made = encoder(**changes)
    except (TypeError, ValueError) as error:
        pytest.skip(f'this NeMo cannot build such an encoder: {error}')
    with pytest.raises(ValueError, match=f'the encoder cannot predict next tokens: .*{reason}'):
        next_token_offset(made, after_subsampling=False)


def test_the_context_may_be_given():
    assert 'receptive field of Linear is not known' in why_no_next_token(torch.nn.Linear(2, 2))
    made = encoder(att_context_size=[[4, 0], [4, 2]])
    assert next_token_offset(made, False) == 0
    assert next_token_offset(made, False, [4, 2]) == 4
    with pytest.raises(ValueError, match='whole utterance'):
        next_token_offset(made, False, [4, -1])
