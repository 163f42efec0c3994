# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
from functools import partial

import pytest
import torch
from attention_windows import attended
from tiny_nest import noise_batch, tiny_model

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.receptive_field import receptive_field, seen_through_layers
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.ssl_reports.model_figures import draw_attention, draw_masks, masked_utterance

POST_CONV = ('model.mask_position=post_conv', 'model.quantizer.combine_time_steps=1')
HIERARCHY = ('model.encoder.n_layers=3', '+model.encoder.layer_att_context_size=[[0,[4,0]],[2,[9,0]]]')


@pytest.mark.unit
@pytest.mark.parametrize('style, context', [('regular', (3, 1)), ('regular', (-1, 0)), ('chunked_limited', (4, 1))])
def test_window_bounds_are_those_of_the_attention(style, context):
    first, last = Window(AttContext(*context), style).bounds(torch.arange(12))
    for frame, row in enumerate(attended(context, style, 12).tolist()):
        seen = [other for other, flag in enumerate(row) if flag]
        assert (max(first[frame], 0), min(last[frame], 11)) == (seen[0], seen[-1])


@pytest.mark.unit
def test_windows_of_an_unknown_style_are_refused():
    with pytest.raises(ValueError, match="att_context_style is 'chunked_limited_with_rc'"):
        Window(AttContext(4, 1), 'chunked_limited_with_rc')


@pytest.mark.unit
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


@pytest.mark.unit
@pytest.mark.parametrize('position', [(), POST_CONV], ids=['pre_conv', 'post_conv'])
def test_a_masked_utterance(position):
    model, batch = tiny_model(*position).eval(), noise_batch((3.0, 2.0))
    with torch.no_grad(), model.encoder.using_att_context_size([20, 0]):
        _, record = model.predict_batch(batch, partial(model.mask_processor, effective_left_context=20))
        utterance = masked_utterance(model, record, index=1)
    frames = int(record.mask_lengths[1])
    assert utterance.window == Window(AttContext(20, 0)) and utterance.masks.shape == (frames,)
    assert utterance.masks.tolist() == record.masks[1, 0, :frames].tolist()
    assert utterance.features.shape[0] == 80 and 200 <= utterance.features.shape[1] <= 201
    lower = draw_masks(model, utterance).axes[1]
    assert 'unanswerable (0)' in [text.get_text() for text in lower.get_legend().get_texts()]


@pytest.mark.unit
def test_attention_of_a_frame():
    encoder = tiny_model(*HIERARCHY).encoder
    axis = draw_attention(encoder, frame=30, frames=40, frame_seconds=0.08, att_context_size=[6, 0]).axes[0]
    windows = [(patch.get_x(), patch.get_width()) for patch in axis.patches if patch.get_height() < 0.5]
    assert windows == [(26, 5), (26, 5), (24, 7)]
    with pytest.raises(ValueError, match='frame is 40; the utterance has attention frames 0 to 39'):
        draw_attention(encoder, frame=40, frames=40, frame_seconds=0.08)
