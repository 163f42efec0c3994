# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from attention_windows import attended
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo.collections.asr.parts.att_context import blockwise
from nemo.collections.asr.parts.att_context.blockwise import BlockwiseMask
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.submodules import multi_head_attention as mha

SIZES = dict(n_head=2, n_feat=8, dropout_rate=0.0)
BIASES = dict(pos_bias_u=None, pos_bias_v=None)
KINDS = [(model, sdpa) for model in ('rel_pos', 'abs_pos') for sdpa in (False, True)]


def make_attention(model, sdpa=False, seed=0, **changes):
    torch.manual_seed(seed)
    arguments = {**SIZES, 'use_pytorch_sdpa': sdpa, **changes}
    cls = mha.MultiHeadAttention if model == 'abs_pos' else mha.RelPositionMultiHeadAttention
    attention = cls(**arguments, **(BIASES if model == 'rel_pos' else {}))
    for parameter in attention.parameters():  # NeMo's biases of positions begin at 0
        torch.nn.init.normal_(parameter, std=0.4)
    return attention


def positions(frames, features=8):
    """Positional embeddings, [1, 2 * T - 1, features]."""
    return torch.randn(1, 2 * frames - 1, features, generator=torch.Generator().manual_seed(1))


def both_masks(context, style, lengths, frames):
    """NeMo's mask [B, T, T], True = hidden, from the definition of the style; and the one of blocks."""
    padding = torch.arange(frames) >= torch.tensor(lengths).unsqueeze(1)
    visible = attended(context, style, frames) & ~padding.unsqueeze(1) & ~padding.unsqueeze(2)
    return ~visible, BlockwiseMask(Window(AttContext(*context), style), padding)


def attend(attention, frames, mask, pos_emb, weights=None):
    """Return the output, and after it all gradients of its weighted sum."""
    frames, pos_emb = frames.detach().requires_grad_(), pos_emb.detach().requires_grad_()
    output = attention(frames, frames, frames, mask, pos_emb=pos_emb)
    if weights is None:
        return [output.detach()]
    inputs = [frames, pos_emb, *attention.parameters()]
    gradients = torch.autograd.grad((output * weights).sum(), inputs, allow_unused=True)
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


@st.composite
def attentions(draw):
    """Lengths of a ragged batch, the style and a context: from one frame to more than the audio has."""
    frames = draw(st.integers(1, 600))
    lengths = [frames, draw(st.integers(0, frames)), draw(st.integers(1, frames))]
    style = draw(st.sampled_from(['regular', 'chunked_limited']))
    reach = st.one_of(st.integers(0, 12), st.integers(0, 90), st.integers(frames, 2 * frames))
    left, right = draw(reach), draw(st.one_of(st.just(0), st.integers(0, 13), reach))
    return lengths, style, (left if style == 'regular' else left // (right + 1) * (right + 1), right)


class TestBlocks:
    @settings(max_examples=60)
    @given(case=attentions(), kind=st.sampled_from(KINDS), heads=st.sampled_from([1, 2]))
    @example(case=([600, 1, 599], 'regular', (40, 0)), kind=('rel_pos', False), heads=2)
    @example(case=([1, 1, 1], 'regular', (1, 0)), kind=('rel_pos', True), heads=2)
    @example(case=([97, 0, 50], 'regular', (1, 1)), kind=('abs_pos', True), heads=2)
    @example(case=([450, 3, 449], 'chunked_limited', (70, 13)), kind=('rel_pos', False), heads=2)
    @example(case=([600, 1, 599], 'regular', (2, 0)), kind=('rel_pos', False), heads=2)  # many blocks
    @example(case=([600, 1, 599], 'chunked_limited', (4, 1)), kind=('abs_pos', True), heads=2)
    @example(case=([300, 30, 299], 'chunked_limited', (0, 299)), kind=('rel_pos', True), heads=1)
    def test_output_and_gradients_are_those_of_the_masked_computation(self, case, kind, heads):
        lengths, style, context = case
        frames, padded = max(lengths), both_masks(context, style, lengths, max(lengths))
        attention = make_attention(*kind, n_head=heads)
        values, weights = torch.randn(2, len(lengths), frames, 8)
        dense, blocks = (attend(attention, values, mask, positions(frames), weights) for mask in padded)
        assert len(dense) == len(blocks)
        assert (dense[0] - blocks[0]).abs().max() <= 1e-5 * max(1, dense[0].abs().max())
        largest = max(gradient.abs().max() for gradient in dense[1:])
        for expected, gradient in zip(dense[1:], blocks[1:]):
            assert (expected - gradient).abs().max() <= 1e-5 * max(1, largest)

    @pytest.mark.parametrize('model, sdpa', KINDS)
    @pytest.mark.parametrize('style, context', [('regular', (5, 2)), ('chunked_limited', (6, 2))])
    def test_each_gradient_in_double_precision(self, model, sdpa, style, context):
        """Rounding out of the way, even gradients that are small beside others agree."""
        attention = make_attention(model, sdpa).double()
        values, weights = torch.randn(2, 2, 50, 8, dtype=torch.float64)
        dense, blocks = both_masks(context, style, [50, 31], 50)
        blocks.bias = blocks.bias.double()
        pos_emb = positions(50).double()
        for expected, found in zip(
            attend(attention, values, dense, pos_emb, weights), attend(attention, values, blocks, pos_emb, weights)
        ):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize('model, sdpa', KINDS)
    @pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
    def test_half_precision_and_autocast(self, model, sdpa, dtype, tolerance):
        attention, (values, weights) = make_attention(model, sdpa), torch.randn(2, 2, 60, 8)
        masks = both_masks((6, 1), 'regular', [60, 33], 60)
        expected = attend(attention, values, masks[0], positions(60))[0]
        with torch.autocast('cpu', dtype=dtype):
            dense, blocks = (attend(attention, values, mask, positions(60))[0] for mask in masks)
        assert dense.dtype == blocks.dtype == dtype
        assert (dense - blocks).abs().max() < 4e-2 * dense.abs().max()
        found = attend(attention.to(dtype), values.to(dtype), masks[1], positions(60).to(dtype), weights.to(dtype))
        assert found[0].dtype == dtype and all(torch.isfinite(tensor).all() for tensor in found)
        assert (found[0].float() - expected).abs().max() < tolerance * expected.abs().max()

    @pytest.mark.parametrize('model, sdpa', KINDS)
    def test_dropout_scales_what_it_leaves(self, model, sdpa):
        """The mean over many draws is the output without dropout; a single draw is not."""
        attention = make_attention(model, sdpa, dropout_rate=0.3)
        values = torch.randn(1, 20, 8)
        _, blocks = both_masks((4, 0), 'regular', [20], 20)
        _, many = both_masks((4, 0), 'regular', [20] * 4000, 20)
        expected = attend(attention.eval(), values, blocks, positions(20))[0]
        drawn = attend(attention.train(), values.expand(4000, -1, -1), many, positions(20))[0]
        error = drawn.std(dim=0) / 4000**0.5
        assert (drawn[0] - expected).abs().max() > 0.01
        assert ((drawn.mean(dim=0) - expected).abs() < 6 * error + 1e-5).all()

    @pytest.mark.parametrize('model, sdpa', KINDS)
    def test_many_blocks_keep_less_and_drop_the_same_again(self, model, sdpa, monkeypatch):
        attention, frames = make_attention(model, sdpa, dropout_rate=0.3).train(), 400
        values, weights = torch.randn(2, 1, frames, 8)
        _, mask = both_masks((4, 0), 'regular', [frames], frames)
        results = []
        for many in (1, 10**6):
            monkeypatch.setattr(blockwise, 'MANY_WINDOWS', many)
            torch.manual_seed(3)
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
                attention(values.requires_grad_(), values, values, mask, pos_emb=positions(frames))
            torch.manual_seed(3)
            results.append((sum(kept), attend(attention, values, mask, positions(frames), weights)))
        (few, again), (all_of_it, at_once) = results
        assert few < 0.6 * all_of_it
        for expected, found in zip(at_once, again):
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize('model, sdpa', KINDS)
    def test_it_compiles_into_one_graph(self, model, sdpa):
        attention, values = make_attention(model, sdpa).eval(), torch.randn(2, 60, 8)
        _, mask = both_masks((6, 1), 'regular', [60, 33], 60)
        torch.compiler.reset()
        compiled = torch.compile(attention, backend='eager', fullgraph=True)
        expected = attention(values, values, values, mask, pos_emb=positions(60))
        torch.testing.assert_close(compiled(values, values, values, mask, pos_emb=positions(60)), expected)
