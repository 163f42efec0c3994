# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from omegaconf import open_dict
from tiny_nest import POST_CONV, tiny_config, tiny_model

from nemo.collections.asr.modules import ConformerEncoder
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.streaming.prepared_weights import check_encoder_can_stream


def encoder_of(**changed) -> ConformerEncoder:
    cfg = tiny_config().model.encoder
    with open_dict(cfg):
        cfg.update(changed)
    arguments = {key: value for key, value in cfg.items() if key != '_target_'}
    torch.manual_seed(0)
    return ConformerEncoder(**arguments).eval()


@pytest.mark.parametrize(
    'changed, context, reason',
    [
        (dict(conv_context_size=None), (4, 0), 'conv_context_size is .*must be causal'),
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
        check_encoder_can_stream(encoder_of(**changed), AttContext(*context))


def test_other_encoders_and_local_attention_are_refused():
    with pytest.raises(ValueError, match='Linear cannot be streamed'):
        check_encoder_can_stream(torch.nn.Linear(1, 1), AttContext(4, 0))
    model = tiny_model().eval()
    model.encoder.change_attention_model('rel_pos_local_attn', [4, 4])
    with pytest.raises(ValueError, match='self_attention_model is rel_pos_local_attn; use rel_pos'):
        check_encoder_can_stream(model.encoder, AttContext(4, 4))


def test_nemos_own_streaming_is_set_up_alike_with_masking_after_the_convolutions():
    post_conv = tiny_model(*POST_CONV).encoder
    pre_conv = tiny_model().encoder
    for encoder in (pre_conv, post_conv):
        encoder.set_default_att_context_size([10, 0])
    assert vars(post_conv.streaming_cfg) == vars(pre_conv.streaming_cfg)
    assert pre_conv.streaming_cfg.chunk_size == [1, 8]
