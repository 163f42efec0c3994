# SPDX-License-Identifier: Apache-2.0
"""Which layers attend block by block, and that it changes nothing but time and memory.

Shapes: B batch, T attention frames.
"""

import itertools
from unittest import mock

import pytest
import torch
from tensor_sizes import LargestTensor
from tiny_encoder import WITHOUT_DROPOUT, encode, tiny_encoder, with_adapter

from nemo.collections.asr.modules import conformer_encoder
from nemo.collections.asr.modules.conformer_encoder import ConformerEncoderAdapter
from nemo.collections.asr.parts.att_context.blockwise import BlockwiseMask
from nemo.collections.asr.parts.submodules import conformer_modules
from nemo.collections.asr.parts.submodules.adapters.multi_head_attention_adapter_module import (
    RelPositionMultiHeadAttentionAdapterConfig,
)

SCHEDULE = [[0, [4, 0]], [2, [8, 0]]]
KINDS = list(itertools.product(('rel_pos', 'abs_pos'), (False, True)))


def make_encoder(**changes):
    return tiny_encoder(
        std=0.3, **{**WITHOUT_DROPOUT, 'att_context_size': [8, 0], 'blockwise_attention': 'on', **changes}
    )


@pytest.fixture
def reaches(monkeypatch):
    """How far back the blocks of each layer see, in the order of the calls; None: it attends in NeMo's way."""
    stock, seen = conformer_modules._up.ConformerLayer, []
    attend = stock.forward

    def spy(layer, x, att_mask=None, *args, **kwargs):
        seen.append(att_mask.blocks.past if isinstance(att_mask, BlockwiseMask) else None)
        return attend(layer, x, att_mask, *args, **kwargs)

    monkeypatch.setattr(stock, 'forward', spy)
    return seen


class TestWhoAttendsInBlocks:
    @pytest.mark.parametrize(
        'choice, context, layers, frames, expected',
        [
            ('on', [-1, 0], [[4, 0], None, [8, -1], [6, 0]], 20, [4, None, 8, 6]),
            ('off', [8, 0], None, 200, [None] * 4),
            ('auto', [8, 0], None, 20, [None] * 4),
            ('auto', [8, 0], None, 200, [8] * 4),
            ('auto', [60, 0], [[0, [4, 0]], [2, [60, 0]]], 140, [4, 4, None, None]),
        ],
    )
    def test_limited_layers_by_choice_and_length(self, choice, context, layers, frames, expected, reaches):
        contexts = dict(att_context_size=context, layer_att_context_size=layers)
        encode(make_encoder(blockwise_attention=choice, **contexts), torch.randn(2, frames, 16))
        assert reaches == expected

    @pytest.mark.parametrize('choice', ['auto', 'on'])
    def test_cached_steps_and_traces_keep_nemos_way(self, reaches, choice):
        encoder = make_encoder(blockwise_attention=choice)
        caches = encoder.get_initial_cache_state(batch_size=1)
        encoder(
            audio_signal=torch.randn(1, 200, 16),
            length=torch.tensor([200]),
            cache_last_channel=caches[0],
            cache_last_time=caches[1],
            cache_last_channel_len=caches[2],
            bypass_pre_encode=True,
        )
        encoder.requires_grad_(False)
        torch.jit.trace(lambda frames: encode(encoder, frames), torch.randn(1, 200, 16), check_trace=False)
        assert reaches == [None] * 8

    def test_other_attention_is_left_alone(self):
        encoder = make_encoder(self_attention_model='rel_pos_local_attn', att_context_size=[4, 4])
        with mock.patch.object(conformer_encoder, 'BlockwiseMask', side_effect=AssertionError):
            encode(encoder, torch.randn(1, 40, 16))


class TestNothingElseChanges:
    @pytest.mark.parametrize('model, sdpa', KINDS)
    @pytest.mark.parametrize('style, context', [('regular', [6, 2]), ('chunked_limited', [8, 3])])
    def test_outputs_and_gradients_of_a_ragged_batch(self, model, sdpa, style, context):
        settings = dict(self_attention_model=model, use_pytorch_sdpa=sdpa, att_context_style=style)
        encoder = make_encoder(att_context_size=context, **settings).train()
        frames, lengths = torch.randn(3, 150, 16), torch.tensor([150, 77, 1])
        weights, results = torch.randn(3, 150, 16), {}
        for choice in ('off', 'on'):
            encoder.blockwise_attention = choice
            encoder.zero_grad()
            output = encode(encoder, frames, lengths)
            (output * weights).sum().backward()
            gradients = {name: value.grad for name, value in encoder.named_parameters() if value.grad is not None}
            results[choice] = output.detach(), gradients
        (expected, gradients), (found, ours) = results['off'], results['on']
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # padded frames, too
        assert gradients.keys() == ours.keys()
        largest = max(gradient.abs().max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert (gradient - ours[name]).abs().max() < 1e-5 * largest, name

    def test_through_subsampling_and_reduction(self):
        """After a reduction inside the stack the masks are made anew, for fewer frames."""
        reduced = dict(reduction='striding', reduction_position=1, reduction_factor=2)
        encoder = make_encoder(**reduced)
        features, lengths = torch.randn(2, 8, 8 * 90), torch.tensor([8 * 90, 8 * 41])
        with torch.no_grad():
            found, found_lengths = encoder(audio_signal=features, length=lengths)
            encoder.blockwise_attention = 'off'
            expected, expected_lengths = encoder(audio_signal=features, length=lengths)
        assert torch.equal(found_lengths, expected_lengths)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()

    @pytest.mark.parametrize('heads', [1, 2])
    def test_attention_adapters_attend_in_blocks_too(self, heads, reaches):
        encoder = make_encoder(kind=ConformerEncoderAdapter, layer_att_context_size=SCHEDULE)
        frames, lengths = torch.randn(2, 90, 16), torch.tensor([90, 31])
        with torch.no_grad():
            unadapted = encode(encoder, frames, lengths)
            with_adapter(encoder, RelPositionMultiHeadAttentionAdapterConfig(n_head=heads, n_feat=16))
            found = encode(encoder, frames, lengths)
            encoder.blockwise_attention = 'off'
            expected = encode(encoder, frames, lengths)
        assert None not in reaches[:8] and set(reaches[8:]) == {None}
        assert (found - unadapted).abs().max() > 0.1
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()

    def test_no_tensor_grows_with_the_square_of_the_audio(self):
        encoder, largest = make_encoder(layer_att_context_size=SCHEDULE).train(), []
        for frames in (400, 800):
            with LargestTensor() as mode:
                encode(encoder, torch.randn(1, frames, 16)).sum().backward()
            largest.append(mode.elements)
        assert largest[1] < 2.1 * largest[0] and largest[1] < 800 * 800 / 4
