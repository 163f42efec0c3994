# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
import pytest

from nemo.collections.asr.parts.submodules import multi_head_attention as mha
from nemo.collections.asr.parts.submodules.adapters import multi_head_attention_adapter_module as adapters

SIZES = dict(n_head=2, n_feat=8, dropout_rate=0.0)
BIASES = dict(pos_bias_u=None, pos_bias_v=None)


class TestAttContextSize:
    @pytest.mark.unit
    @pytest.mark.parametrize(
        'attention', [mha.MultiHeadAttention(**SIZES), mha.RelPositionMultiHeadAttention(**SIZES, **BIASES)]
    )
    def test_it_is_none_until_set_and_reads_as_a_list(self, attention):
        assert attention.att_context_size is None
        attention.att_context_size = (40, 0)
        assert attention.att_context_size == [40, 0]
        with pytest.raises(ValueError, match='self_attention.att_context_size: the left context is -2'):
            attention.att_context_size = [-2, 0]
        assert attention.att_context_size == [40, 0]
        attention.att_context_size = None
        assert attention.att_context_size is None

    @pytest.mark.unit
    def test_longformer_keeps_the_context_it_was_built_for(self):
        attention = mha.RelPositionMultiHeadAttentionLongformer(**SIZES, **BIASES, att_context_size=[4, 4])
        assert attention.att_context_size == [4, 4] and attention.att_context is None
        with pytest.raises(ValueError, match='rel_pos_local_attn is built for .4, 4.'):
            attention.att_context_size = [2, 4]


class TestClasses:
    @pytest.mark.unit
    def test_subclasses_of_nemo_are_subclasses_of_the_patched_classes(self):
        assert issubclass(mha.RelPositionMultiHeadAttentionLongformer, mha.RelPositionMultiHeadAttention)
        for cls in (mha.RelPositionMultiHeadAttention, adapters.MultiHeadAttentionAdapter):
            assert issubclass(cls, mha.MultiHeadAttention)
        assert issubclass(adapters.RelPositionMultiHeadAttentionAdapter, mha.RelPositionMultiHeadAttention)
