# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
from functools import partial

import pytest
import torch
from tiny_nest import HIERARCHY, POSITIONS, noise_batch, tiny_model

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.ssl_reports.model_figures import draw_attention, draw_masks, masked_utterance


@pytest.mark.unit
@POSITIONS
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
