# SPDX-License-Identifier: Apache-2.0
"""The masked prediction loss: stock's value where stock works, and a value where stock fails.

Shapes: B batch, T decoder frames, S target frames, M mask frames, C classes, H codebooks.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nemo.collections.asr.losses.ssl_losses.mlm as patched
from nemo.collections.asr.losses.ssl_losses.mlm import MLMLoss, MultiMLMLoss

StockMLMLoss, StockMultiMLMLoss = patched._up.MLMLoss, patched._up.MultiMLMLoss


def case(batch=2, frames=6, classes=5, books=(), target_frames=None, mask_frames=None, factor=1, seed=0):
    """Make a random batch in the loss's arguments, with some frames masked and some not."""
    generator = torch.Generator().manual_seed(seed)
    target_frames = frames if target_frames is None else target_frames
    mask_frames = target_frames * factor if mask_frames is None else mask_frames
    logits = torch.randn(batch, frames, classes, *books, generator=generator)
    whole = torch.rand(batch, 1, mask_frames // factor, generator=generator) < 0.5
    whole[0, 0, :2] = torch.tensor([True, False])
    masks = torch.zeros(batch, 3, mask_frames)
    masks[..., : mask_frames // factor * factor] = whole.repeat_interleave(factor, dim=2).float()
    return dict(
        decoder_outputs=logits.log_softmax(dim=2).requires_grad_(),
        targets=torch.randint(classes, (batch, target_frames, *books), generator=generator),
        masks=masks,
    )


def by_hand(log_probs, targets, counted):
    """The mean over (utterance, frame) pairs, in plain Python."""
    picked = [-log_probs[b][t][targets[b][t]] for b, t in counted]
    return sum(picked) / len(picked)


def test_ignored_targets_are_left_out_as_in_stock():
    arguments = case(batch=1, frames=4)
    arguments.update(targets=torch.tensor([[0, -100, 0, -100]]), masks=torch.ones(1, 1, 4))
    expected = StockMLMLoss()(**arguments).item()
    assert MLMLoss()(**arguments).item() == pytest.approx(expected, abs=1e-6)


class TestStockFailures:
    @pytest.mark.parametrize('stock, fixed', [(StockMLMLoss, MLMLoss), (StockMultiMLMLoss, MultiMLMLoss)])
    @pytest.mark.parametrize('frames, target_frames', [(211, 210), (210, 211)])
    def test_210_against_211_frames(self, stock, fixed, frames, target_frames):
        books = (1,) if stock is StockMultiMLMLoss else ()
        arguments = case(frames=frames, target_frames=target_frames, books=books, factor=8)
        with pytest.raises(IndexError, match=f'{target_frames}'):
            stock(combine_time_steps=8)(**arguments)
        cut = dict(arguments)
        cut['decoder_outputs'] = arguments['decoder_outputs'][:, :210]
        cut['targets'], cut['masks'] = arguments['targets'][:, :210], arguments['masks'][..., : 8 * 210]
        value = fixed(combine_time_steps=8)(**arguments)
        assert value.item() == pytest.approx(stock(combine_time_steps=8)(**cut).item(), abs=1e-6)

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_no_masked_frame(self, dtype):
        arguments = case()
        arguments['masks'] = torch.zeros_like(arguments['masks'])
        assert StockMLMLoss()(**arguments).isnan()
        outputs = arguments['decoder_outputs'].detach().to(dtype).requires_grad_()
        loss = MLMLoss()(**{**arguments, 'decoder_outputs': outputs})
        loss.backward()
        assert loss.item() == 0 and not outputs.grad.any()

    @pytest.mark.parametrize('mask_frames', [49, 55])
    def test_mask_frames_beyond_the_last_whole_attention_frame(self, mask_frames):
        arguments = case(frames=6, mask_frames=mask_frames, factor=8)
        with pytest.raises(RuntimeError):
            StockMLMLoss(combine_time_steps=8)(**arguments)
        whole = {**arguments, 'masks': arguments['masks'][..., :48]}
        expected = StockMLMLoss(combine_time_steps=8)(**whole)
        assert MLMLoss(combine_time_steps=8)(**arguments).item() == pytest.approx(expected.item(), abs=1e-6)

    @pytest.mark.parametrize('books', [1, 2])
    def test_call_of_speech_enc_dec_self_supervised_model(self, books):
        """``decoder_loss_step`` asks for needs_labels and passes spec_masks; stock's MultiMLMLoss takes neither."""
        arguments = case(books=(books,))
        call = {name: arguments[name] for name in ('decoder_outputs', 'targets')}
        call.update(spec_masks=arguments['masks'], decoder_lengths=torch.tensor([6, 6]), target_lengths=None)
        with pytest.raises(TypeError):
            StockMultiMLMLoss(num_decoders=books)(**call)
        expected = StockMultiMLMLoss(num_decoders=books)(**arguments)
        assert MultiMLMLoss(num_decoders=books)(**call).item() == pytest.approx(expected.item(), abs=1e-6)


class TestMasksOfEitherShape:
    @pytest.mark.parametrize('loss, books', [(MLMLoss, ()), (MultiMLMLoss, (2,))])
    @pytest.mark.parametrize('frames', [6, 7, 5])
    @pytest.mark.parametrize('factor', [1, 8])
    @pytest.mark.parametrize('argument', ['masks', 'spec_masks'])
    def test_the_value_is_the_same(self, loss, books, frames, factor, argument):
        arguments = case(frames=frames, target_frames=6, factor=factor, books=books)
        masks = arguments.pop('masks')
        settings = {'num_decoders': 2} if books else {}
        value = {
            name: loss(combine_time_steps=factor, **settings)(**{**arguments, argument: given}).item()
            for name, given in (
                ('3', masks),
                ('3 bool', masks.bool()),
                ('2', masks[:, 0]),
                ('2 bool', masks[:, 0] > 0),
            )
        }
        assert len(set(value.values())) == 1 and value['3'] > 0


class TestAsStock:
    @settings(max_examples=40)
    @given(
        st.integers(1, 4), st.integers(2, 30), st.integers(2, 40), st.sampled_from([1, 4, 8]), st.integers(0, 10**6)
    )
    def test_value_and_gradient(self, batch, frames, classes, factor, seed):
        arguments = case(batch, frames, classes, factor=factor, seed=seed)
        arguments['masks'] = arguments['masks'] * (torch.rand(arguments['masks'].shape) < 0.95)  # partly masked too
        arguments['masks'][0, :, :factor] = 1
        self.compare(StockMLMLoss(factor), MLMLoss(factor), arguments)
        self.compare(StockMLMLoss(factor, 0.5), MLMLoss(factor, 0.5), arguments)

    def test_a_squeezed_book(self):
        arguments = case(seed=3)
        self.compare(StockMultiMLMLoss(squeeze_single=True), MultiMLMLoss(squeeze_single=True), arguments)

    @pytest.mark.parametrize('books', [1, 2, 4])
    @pytest.mark.parametrize('factor', [1, 8])
    def test_several_books(self, books, factor):
        arguments = case(books=(books,), factor=factor, seed=books)
        self.compare(StockMultiMLMLoss(factor, 0.8, books), MultiMLMLoss(factor, 0.8, books), arguments)

    def compare(self, stock, fixed, arguments):
        values, gradients = [], []
        for loss in (stock, fixed):
            arguments['decoder_outputs'].grad = None
            value = loss(**arguments)
            value.backward()
            values.append(value.item())
            gradients.append(arguments['decoder_outputs'].grad)
        assert values[1] == pytest.approx(values[0], abs=1e-6, rel=1e-6)
        torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


class TestWhatNeverCounts:
    @pytest.mark.parametrize('garbage', [float('nan'), float('-inf'), float('inf')])
    def test_garbage_in_ignored_frames(self, garbage):
        arguments = case(frames=8, seed=5)
        arguments['decoder_lengths'] = torch.tensor([8, 5])
        clean = MLMLoss()(**arguments)
        clean.backward()
        gradient = arguments['decoder_outputs'].grad
        counted = arguments['masks'][:, 0].bool() & (torch.arange(8) < arguments['decoder_lengths'].unsqueeze(1))
        outputs = arguments['decoder_outputs'].detach().clone()
        outputs[~counted] = garbage
        targets = torch.where(counted, arguments['targets'], 10**6)
        dirty = {**arguments, 'decoder_outputs': outputs.requires_grad_(), 'targets': targets}
        loss = MLMLoss()(**dirty)
        loss.backward()
        assert loss.item() == clean.item() and torch.equal(outputs.grad, gradient)

    @settings(max_examples=60)
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 3), st.data())
    def test_alignment(self, frames, target_frames, mask_frames, offset, data):
        """Whatever the three lengths, the loss is the mean over the frames that all have, counted one by one."""
        arguments = case(2, frames, target_frames=target_frames, mask_frames=max(mask_frames, 2), seed=frames)
        lengths = data.draw(st.lists(st.integers(0, 13), min_size=2, max_size=2))
        masks = arguments['masks'][:, 0].tolist()
        common = min(frames - offset, target_frames, len(masks[0]))
        counted = [(b, t) for b in range(2) for t in range(max(common, 0)) if masks[b][t] and t + offset < lengths[b]]
        loss = MLMLoss(decoder_offset=offset)(**arguments, decoder_lengths=torch.tensor(lengths))
        log_probs = arguments['decoder_outputs'][:, offset:].tolist()
        expected = by_hand(log_probs, arguments['targets'].tolist(), counted) if counted else 0.0
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        loss.backward()
        assert arguments['decoder_outputs'].grad.isfinite().all()


class TestPrecisionAndDevices:
    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize('masks_dtype', [torch.float16, torch.bfloat16, torch.float32, torch.bool])
    def test_half_precision_is_summed_in_float32(self, dtype, masks_dtype):
        """4000 frames of loss 9: half precision cannot hold their sum."""
        outputs = torch.full((2, 2000, 3), -9.0, dtype=dtype, requires_grad=True)
        masks = torch.ones(2, 1, 2000).to(masks_dtype)
        loss = MLMLoss()(decoder_outputs=outputs, targets=torch.zeros(2, 2000, dtype=torch.int64), masks=masks)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.item() == 9.0 and outputs.grad.dtype == dtype
