# SPDX-License-Identifier: Apache-2.0
"""Logits at the loss positions alone give the loss and the gradients of logits for all frames."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from tiny_nest import POST_CONV, batches, fit, noise_batch, signals, tiny_model

from nemo.collections.asr.losses import MultiMLMLoss
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.modules.ssl_modules.multi_softmax_decoder import MultiSoftmaxDecoder
from nemo.collections.asr.parts.objectives.masked_tokens import MaskedTokens, why_all_frames

SQUEEZED = ('model.squeeze_single=true',)
TWO_BOOKS = ('model.num_books=2',)


def whole(model, batch):
    """The loss by way of forward and loss, over all frames, as NeMo's training step computes it."""
    log_probs, lengths, masks, tokens = model.forward(**signals(batch), apply_mask=True)
    return model.loss(masks=masks, decoder_outputs=log_probs, targets=tokens, decoder_lengths=lengths)


def masked_pass(model, batch, apply_mask=True):
    """A forward pass as in a training step."""
    with model._one_context():
        return model.encode_batch(batch, model.masking_in_context() if apply_mask else None)


def masked_only(model, batch):
    """The loss by way of the frames that count."""
    return model.objectives.loss(masked_pass(model, batch)).loss


def loss_and_gradients(model, compute, autocast=False):
    """The loss of one way, with the same masks and context each time, and all gradients in one vector."""
    model.zero_grad()
    model.encoder._draws = 0
    torch.manual_seed(3)
    with torch.autocast('cpu', dtype=torch.bfloat16) if autocast else nullcontext():
        loss = compute(model, noise_batch((2.0, 1.3), seed=1))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize('autocast', [False, True], ids=['float32', 'bf16-mixed'])
@pytest.mark.parametrize(
    'overrides',
    [
        (),
        SQUEEZED,
        TWO_BOOKS,
        ('model.loss.decoder_offset=0',),
        POST_CONV,
    ],
    ids=['one book', 'squeezed', 'two books', 'no offset', 'post_conv'],
)
def test_loss_and_gradients_equal_those_of_all_frames(overrides, autocast):
    model = tiny_model(*overrides).train()
    assert why_all_frames(model.decoder, model.loss) is None
    expected, expected_gradients = loss_and_gradients(model, whole, autocast)
    loss, gradients = loss_and_gradients(model, masked_only, autocast)
    tolerance = 2e-2 if autocast else 1e-5  # in bfloat16 even the order of a sum shows in the third digit
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    assert gradients.shape == expected_gradients.shape
    assert (gradients - expected_gradients).norm() <= tolerance * expected_gradients.norm()


class SameForward(EncDecDenoiseMaskedTokenPredModel):
    """A user's model whose steps are NeMo's, for it has a forward."""

    def forward(self, **arguments):
        return super().forward(**arguments)


def test_a_training_runs_losses_are_those_of_nemos_own_step():
    losses = []
    for cls in (EncDecDenoiseMaskedTokenPredModel, SameForward):
        model = tiny_model('model.validate_contexts=null', cls=cls)
        torch.manual_seed(1)
        losses.append(fit(model, batches(3), 3).logger.column('train_loss'))
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_predictions_name_their_utterance_and_are_those_of_forward():
    model = tiny_model('model.loss.decoder_offset=1', *SQUEEZED).eval()
    batch = noise_batch((2.0, 1.3, 1.6), seed=2)
    torch.manual_seed(4)
    with torch.no_grad():
        predictions = model.objectives.find(MaskedTokens).predictions(masked_pass(model, batch))
    torch.manual_seed(4)
    batch = noise_batch((2.0, 1.3, 1.6), seed=2)
    with torch.no_grad():
        log_probs, lengths, masks, tokens = model.forward(**signals(batch), apply_mask=True)
    rows = []
    for utterance in range(3):
        for frame in range(tokens.shape[1]):
            hidden = masks[utterance, 0, frame * 8 : frame * 8 + 8].mean() > 0.8
            if hidden and frame + 1 < lengths[utterance]:
                rows.append((utterance, frame))
    assert predictions.utterances.tolist() == [utterance for utterance, _ in rows]
    assert predictions.targets.tolist() == [tokens[row].item() for row in rows]
    expected = torch.stack([log_probs[utterance, frame + 1] for utterance, frame in rows])
    torch.testing.assert_close(predictions.outputs, expected)


@pytest.mark.parametrize('overrides', [(), TWO_BOOKS], ids=['one book', 'two books'])
def test_without_a_frame_that_counts_the_loss_is_zero_and_every_gradient_is_there(overrides):
    model = tiny_model(*overrides).train()
    loss = model.objectives.loss(masked_pass(model, noise_batch((1.0,)), apply_mask=False)).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and 'pos_bias' not in name}
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in trained.values())


def test_the_decoder_sees_no_frame_but_those_that_count():
    model = tiny_model().train()
    seen = []
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs['encoder_output'].shape), with_kwargs=True
    )
    with mock.patch.object(model.loss, 'of_frames', wraps=model.loss.of_frames) as of_frames:
        model.objectives.loss(masked_pass(model, noise_batch((2.0, 1.3))))
    positions = len(model.objectives.find(MaskedTokens).frame_losses[0])
    assert seen == [(1, 16, positions)] and positions < 2 * 25 and of_frames.call_count == 1


class NeighbourDecoder(MultiSoftmaxDecoder):
    """A user's decoder that looks at neighbouring frames, too."""

    def forward(self, encoder_output):
        return super().forward(encoder_output=encoder_output + encoder_output.roll(1, dims=2))


class HalvedLoss(MultiMLMLoss):
    """A user's loss."""

    def forward(self, **arguments):
        return super().forward(**arguments) / 2


def with_decoder_of_user(model):
    model.decoder.__class__ = NeighbourDecoder


def with_wide_decoder(model):
    layer = torch.nn.Conv1d(16, 32, kernel_size=3, padding=1)
    model.decoder.decoder_layers = torch.nn.Sequential(layer)


def with_loss_of_user(model):
    model.loss = HalvedLoss(combine_time_steps=8, decoder_offset=1)


@pytest.mark.parametrize(
    'change, named',
    [
        (with_decoder_of_user, 'NeighbourDecoder'),
        (with_wide_decoder, 'MultiSoftmaxDecoder.decoder_layers'),
        (with_loss_of_user, 'HalvedLoss'),
    ],
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_what_may_need_all_frames_gets_them_and_one_warning_names_it(change, named, warnings):
    model = tiny_model()
    change(model)
    losses = fit(model, batches(2), 2).logger.column('train_loss')
    told = [message for message in warnings if 'logits for all frames' in message]
    assert len(told) == 1 and named in told[0]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
