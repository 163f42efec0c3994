# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from live_streams import noise
from tiny_nest import tiny_model
from tiny_recogniser import tiny_recogniser

from nemo.collections.asr.parts.streaming.decoding import decode_frames, decoder_of
from nemo.collections.asr.parts.streaming.session import StreamingSession


@pytest.mark.parametrize('objective', ['masked', 'next_token', 'both'])
def test_log_probabilities_and_tokens_are_those_of_the_models_own_forward(objective):
    model = tiny_model(f'+model.objective={objective}').eval()
    assert decoder_of(model) is (model.next_token_decoders[0] if objective == 'next_token' else model.decoder)
    samples = noise(1, 16000)
    signals = dict(input_signal=samples, noisy_input_signal=samples)
    lengths = dict.fromkeys(['input_signal_length', 'noisy_input_signal_length'], torch.tensor([16000]))
    with torch.no_grad(), model.encoder.using_att_context_size([8, 0]):
        log_probs = model(**signals, **lengths, apply_mask=False)[0]
    session = StreamingSession(model, 1, [8, 0], return_log_probs=True, return_tokens=True)
    output = session.step(samples, None, [True])
    torch.testing.assert_close(output.log_probs, log_probs[:, : output.lengths[0]], atol=1e-4, rtol=0)
    assert torch.equal(output.tokens, output.log_probs.argmax(dim=2))


@pytest.mark.parametrize(('override', 'shape'), [('num_books=2', (2, 0, 32, 2)), ('squeeze_single=true', (2, 0, 32))])
def test_of_no_frames_there_are_no_log_probabilities(override, shape):
    decoder = tiny_model(f'model.{override}').decoder
    assert decode_frames(decoder, torch.zeros(2, 16, 0)).shape == shape
    assert decode_frames(decoder, torch.zeros(2, 16, 3)).shape == (2, 3, *shape[2:])


def test_a_model_without_a_decoder_is_refused():
    with pytest.raises(ValueError, match='need a decoder that takes encoder_output; Linear has none'):
        decoder_of(torch.nn.Linear(1, 1))


def test_frames_of_a_hybrid_model_are_those_of_its_ctc_decoder():
    model = tiny_recogniser('hybrid')
    assert decoder_of(model) is model.ctc_decoder
    samples = noise(1, 16000)
    output = StreamingSession(model, 1, [8, 0], return_tokens=True).step(samples, None, [True])
    assert torch.equal(output.tokens, model.ctc_decoder(encoder_output=output.encoded).argmax(dim=2))
