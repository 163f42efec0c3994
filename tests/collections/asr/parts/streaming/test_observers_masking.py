# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny_nest import POST_CONV, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel, EncDecMaskedTokenPredModel
from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession

OFTEN_MASKED_PLAIN_TARGETS = ('model.masking.mask_prob=0.03', 'model.target_normalize=null')
MORE_POST_CONV = (*POST_CONV, 'model.masking.block_size=16', 'model.masking.mask_prob=0.1')


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).cumsum(dim=-1) * 0.01


def test_masking_gets_the_new_frames_their_count_so_far_and_the_window():
    model, calls = tiny_model(*OFTEN_MASKED_PLAIN_TARGETS).eval(), []
    forward = model.mask_processor.forward

    def watch(input_feats, input_lengths, current_frame, effective_window, **more):
        calls.append((input_feats.shape[2], current_frame.tolist(), effective_window.context.left))
        return forward(input_feats, input_lengths, current_frame, effective_window=effective_window, **more)

    model.mask_processor.forward = watch
    session = StreamingSession(model, 1, [4, 0], apply_mask=True)
    received = [session.step(piece).current_frame.tolist() for piece in noise(1, 4000).split(1280, dim=1)]
    assert received == [[7], [15], [23], [24]]
    assert calls == [(7, [7], 4), (8, [15], 4), (8, [23], 4), (1, [24], 4)]


@pytest.mark.parametrize('overrides', [(), MORE_POST_CONV], ids=['pre_conv', 'post_conv'])
@pytest.mark.parametrize('offset', [0, 1])
def test_the_loss_is_that_of_the_offline_forward_with_the_same_masks(overrides, offset):
    cls = EncDecMaskedTokenPredModel if overrides else EncDecDenoiseMaskedTokenPredModel
    model = tiny_model(*OFTEN_MASKED_PLAIN_TARGETS, *overrides, f'model.loss.decoder_offset={offset}', cls=cls).eval()
    torch.manual_seed(0)
    session = StreamingSession(model, 2, [20, 0], apply_mask=True, return_log_probs=True)
    samples = noise(2, 48000)
    outputs = [session.step(piece) for piece in samples.split(2560, dim=1)] + [session.finish()]
    output = StreamingOutput.concatenate(outputs)
    assert output.masked_frames > 4
    assert output.masks.shape == (2, int(output.mask_lengths[0]))

    # offline, with the masks that the streams drew
    def mask(input_feats, input_lengths, **_):
        masks = torch.nn.functional.pad(output.masks, (0, input_feats.shape[2] - output.masks.shape[1]))
        masks = masks.unsqueeze(1).expand_as(input_feats)
        return torch.where(masks > 0, model.mask_processor.mask_embedding.view(1, -1, 1), input_feats), masks

    model.mask_processor.forward = mask
    lengths = torch.tensor([48000, 48000])
    signals = dict(input_signal=samples, input_signal_length=lengths, apply_mask=True)
    if not overrides:
        signals.update(noisy_input_signal=samples, noisy_input_signal_length=lengths)
    with torch.no_grad(), model.encoder.using_att_context_size([20, 0]):
        log_probs, encoded_lengths, masks, tokens = model(**signals)
        loss = model.loss(masks=masks, decoder_outputs=log_probs, targets=tokens, decoder_lengths=encoded_lengths)
    assert output.lengths.tolist() == encoded_lengths.tolist()
    torch.testing.assert_close(output.log_probs, log_probs[:, : output.lengths[0]], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, loss, atol=1e-4, rtol=0)


def test_a_masked_stream_is_saved_restored_and_reset():
    model = tiny_model(*OFTEN_MASKED_PLAIN_TARGETS).eval()
    session, other = (StreamingSession(model, 1, [20, 0], apply_mask=True) for _ in range(2))
    session.step(noise(1, 16000))
    other.load_state_dict(session.state_dict())
    outputs = []
    for going_on in (session, other):
        torch.manual_seed(1)
        outputs.append(going_on.step(noise(1, 16000)))
    assert torch.equal(outputs[0].masks, outputs[1].masks) and torch.equal(outputs[0].loss, outputs[1].loss)
    session.reset([0])
    observed = session._observers.streams[0]
    assert observed.count == 0 and not observed.masks.numel()
