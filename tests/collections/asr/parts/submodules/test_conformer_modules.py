# SPDX-License-Identifier: Apache-2.0
import torch

from nemo.collections.asr.parts.att_context import AttContext, LayerAttentionMasks
from nemo.collections.asr.parts.att_context.layer_contexts import LayerContext
from nemo.collections.asr.parts.submodules.conformer_modules import ConformerLayer


class TestConformerLayer:
    def test_it_picks_the_mask_of_its_own_context(self):
        torch.manual_seed(0)
        layer = ConformerLayer(
            d_model=8,
            d_ff=16,
            self_attention_model='abs_pos',
            n_heads=2,
            conv_kernel_size=3,
            conv_norm_type='layer_norm',
        ).eval()
        signal = torch.randn(1, 6, 8)
        frame, key = torch.arange(6).unsqueeze(1), torch.arange(6)
        wide, narrow = AttContext(2, 0), AttContext(1, 0)
        hidden = {context: ((key > frame) | (key < frame - context.left)).unsqueeze(0) for context in (wide, narrow)}
        masks = LayerAttentionMasks(hidden, [wide, narrow])
        layer.self_attn.layer_context = LayerContext(None, 0)
        assert torch.equal(layer(signal, masks), layer(signal, att_mask=hidden[wide]))
        layer.self_attn.layer_context = LayerContext(None, 1)
        assert layer.self_attention is layer.self_attn
        assert torch.equal(layer(signal, att_mask=masks), layer(signal, hidden[narrow]))
        assert not torch.equal(layer(signal, hidden[narrow]), layer(signal, hidden[wide]))
