# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from omegaconf import open_dict
from tiny_nest import POST_CONV, tiny_config, tiny_model

from nemo.collections.asr.modules import ConformerEncoder
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.streaming.encoder import StreamingEncoder


def encoder_of(**changed) -> ConformerEncoder:
    cfg = tiny_config().model.encoder
    with open_dict(cfg):
        cfg.update(changed)
    arguments = {key: value for key, value in cfg.items() if key != '_target_'}
    torch.manual_seed(0)
    return ConformerEncoder(**arguments).eval()


def hidden(style: str, context, cached: int, new: int, first: int) -> list[str]:
    """The mask as text, a row for each new frame: x hidden, o visible."""
    encoder = encoder_of(att_context_style=style, att_context_size=[list(context)])
    window = Window(AttContext(*context), style)
    mask = StreamingEncoder(encoder, AttContext(*context))._hidden(window, cached, new, [first])
    return [''.join('x' if cell else 'o' for cell in row) for row in mask[0].tolist()]


@pytest.mark.parametrize(
    'style, context, cached, new, first, expected',
    [
        ('regular', (2, 0), 2, 2, 0, ['xxox', 'xxoo']),  # nothing before the stream began
        ('regular', (2, 0), 2, 2, 1, ['xoox', 'xooo']),
        ('regular', (2, 0), 2, 2, 9, ['ooox', 'xooo']),
        ('regular', (1, 1), 1, 3, 9, ['ooox', 'xooo', 'xxoo']),
        ('regular', (-1, 0), 3, 1, 3, ['oooo']),
        ('chunked_limited', (2, 1), 2, 4, 8, ['ooooxx', 'ooooxx', 'xxoooo', 'xxoooo']),
        ('chunked_limited', (0, 1), 0, 2, 8, ['oo', 'oo']),
        ('chunked_limited', (2, 1), 2, 1, 0, ['xxo']),  # a last, short chunk
    ],
)
def test_masks(style, context, cached, new, first, expected):
    assert hidden(style, context, cached, new, first) == expected


def test_positions_are_the_first_of_those_that_nemo_takes():
    encoder = encoder_of()
    streaming = StreamingEncoder(encoder, AttContext(4, 0))
    _, whole = encoder.pos_enc(x=torch.zeros(1, 3, encoder.d_model), cache_len=4)
    torch.testing.assert_close(streaming._positions(4, 3), whole[:, : 4 + 2 * 3 - 1], atol=0, rtol=0)


def test_the_table_of_positions_grows_and_the_model_can_train_afterwards():
    encoder = encoder_of(pos_emb_max_len=4)
    streaming = StreamingEncoder(encoder, AttContext(-1, 0))
    with torch.inference_mode():
        state = streaming.new_state(1, 80)
        for frames in torch.randn(80, 200).split(50, dim=1):
            streaming.step(state, [frames], [False])
    encoded, _ = encoder.train()(audio_signal=torch.randn(1, 80, 64), length=torch.tensor([64]))
    encoded.sum().backward()


@pytest.mark.parametrize(
    'changed, context, reason',
    [
        (dict(conv_context_size=None), (4, 0), 'its convolutions are not causal'),
        (dict(causal_downsampling=False), (4, 0), 'causal_downsampling is false'),
        (dict(subsampling='vggnet'), (4, 0), 'subsampling is vggnet'),
        (dict(conv_norm_type='group_norm4'), (4, 0), 'conv_norm_type is group_norm4'),
        (dict(conv_norm_type='instance_norm'), (4, 0), 'conv_norm_type is instance_norm'),
        (dict(self_attention_model='abs_pos'), (4, 0), 'self_attention_model is abs_pos'),
        (dict(), (-1, -1), 'the right context of layer 0 is unlimited'),
        (dict(att_context_style='chunked_limited', att_context_size=[[4, 1]]), (3, 1), 'must be a multiple'),
        (dict(reduction='pooling', reduction_position=0, reduction_factor=2), (4, 0), 'encoder.reduction'),
        (dict(subsampling_conv_chunking_factor=2), (4, 0), 'subsampling_conv_chunking_factor is 2'),
    ],
)
def test_what_cannot_stream_is_refused_with_the_reason(changed, context, reason):
    with pytest.raises(ValueError, match=reason):
        StreamingEncoder(encoder_of(**changed), AttContext(*context))


def test_another_encoder_is_refused():
    with pytest.raises(ValueError, match='Linear cannot be streamed'):
        StreamingEncoder(torch.nn.Linear(1, 1), AttContext(4, 0))


def test_local_attention_is_refused():
    model = tiny_model().eval()
    model.encoder.change_attention_model('rel_pos_local_attn', [4, 4])
    with pytest.raises(ValueError, match='rel_pos_local_attn, which cannot be streamed'):
        StreamingEncoder(model.encoder, AttContext(4, 4))


def test_a_layer_takes_what_it_is_told_to_forget_from_nobody_else():
    encoder = encoder_of(att_context_size=[[4, 2]])
    attention = encoder.layers[0].self_attn
    before = attention.cache_drop_size
    streaming = StreamingEncoder(encoder, AttContext(4, 0))
    state = streaming.new_state(1, 80)
    streaming.step(state, [torch.randn(80, 33)], [False])
    assert attention.cache_drop_size == before == 2


def test_nemos_own_streaming_is_set_up_alike_with_masking_after_the_convolutions():
    post_conv = tiny_model(*POST_CONV).encoder
    pre_conv = tiny_model().encoder
    for encoder in (pre_conv, post_conv):
        encoder.set_default_att_context_size([10, 0])
    assert vars(post_conv.streaming_cfg) == vars(pre_conv.streaming_cfg)
    assert pre_conv.streaming_cfg.chunk_size == [1, 8]


def test_a_stream_that_ended_in_a_part_of_a_chunk_is_left_alone():
    encoder = encoder_of(att_context_style='chunked_limited', att_context_size=[[8, 3]])
    streaming = StreamingEncoder(encoder, AttContext(8, 3))
    state = streaming.new_state(2, 80)
    with torch.inference_mode():
        streaming.step(state, [torch.randn(80, 1), torch.randn(80, 2)], [True, True])
        ended = [frames.shape for frames in state.features], list(state.frames)
        later = streaming.step(state, [torch.zeros(80, 0)] * 2, [False, False])
    assert [frames.shape[1] for frames in later] == [0, 0]
    assert ended == ([frames.shape for frames in state.features], list(state.frames))
