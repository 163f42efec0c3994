# SPDX-License-Identifier: Apache-2.0
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_streams import RAGGED, noise, stream
from tiny_nest import POST_CONV, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel, EncDecMaskedTokenPredModel
from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession

NEXT = ('+model.objective=next_token', '+model.next_token.horizons=2', 'model.encoder.n_layers=2')
PLAIN = 'model.target_normalize=null'
CHUNKED = ('model.encoder.att_context_style=chunked_limited', 'model.encoder.att_context_size=[[8,3],[4,1]]')
CASES = {  # name: overrides, context, offset
    'causal': ((PLAIN,), [4, 0], 0),
    'running statistics': ((), [4, 0], 0),
    'all of the past': ((PLAIN,), [-1, 0], 0),
    'look-ahead': ((PLAIN, 'model.encoder.att_context_size=[[6,2]]'), [6, 2], 4),
    'chunked': ((PLAIN, *CHUNKED), [8, 3], 3),
    'chunked, layers hear less': ((*CHUNKED, '+model.encoder.layer_att_context_size=[[4,1],[8,1]]'), [8, 3], 1),
    'codebooks': (('model.num_books=3',), [4, 0], 0),
    'one codebook without its dimension': ((PLAIN, 'model.squeeze_single=true'), [4, 0], 0),
    'post conv': ((PLAIN, *POST_CONV), [4, 0], 1),
    'post conv, running statistics, look-ahead': (POST_CONV, [6, 1], 3),
    'both': ((PLAIN, '+model.objective=both'), [4, 0], 0),
    'factor 4': ((PLAIN, 'model.encoder.subsampling_factor=4', 'model.quantizer.combine_time_steps=4'), [4, 0], 0),
}


@functools.cache
def model_of(case: str):
    overrides = CASES[case][0]
    cls = EncDecMaskedTokenPredModel if 'post conv' in case else EncDecDenoiseMaskedTokenPredModel
    return tiny_model(*NEXT[any('objective' in override for override in overrides) :], *overrides, cls=cls).eval()


def tokens_by_definition(model, frames: torch.Tensor) -> torch.Tensor:
    """Tokens [S] or [S, H] of frames [F, M], each standardised by the frames up to its own last one."""
    combined = model.quantizer.combine_time_steps
    tokens = []
    for end in range(combined, frames.shape[1] + 1, combined):
        own, heard = frames[:, end - combined : end], frames[:, :end].double()
        if model.target_normalize == 'per_feature':
            std = heard.std(dim=1, keepdim=True) if end > 1 else torch.zeros(len(heard), 1)
            own = ((own.double() - heard.mean(dim=1, keepdim=True)) / (std + 1e-5)).float()
        tokens.append(model.quantizer(input_signal=own.unsqueeze(0))[1][0, 0])
    return torch.stack(tokens) if tokens else torch.zeros(0, dtype=torch.int64)


@torch.no_grad()
def by_definition(model, samples, context, offset):
    """Surprise [S] and next tokens [A, K] or [A, K, H] of one whole stream [1, N]."""
    with model.encoder.using_att_context_size(context):
        frames, length = model.preprocessor(input_signal=samples, length=torch.tensor([samples.shape[1]]))
        encoded, encoded_length = model.encoder(audio_signal=frames, length=length)
        if model.pre_encoder is not None:
            frames, length = model.pre_encoder.pre_encode(x=frames.transpose(1, 2), lengths=length)
            frames = frames.transpose(1, 2)
    tokens = tokens_by_definition(model, frames[0, :, :length])
    predictions = [decoder(encoder_output=encoded)[0, :encoded_length] for decoder in model.next_token_decoders]
    surprise = []
    for frame in range(min(int(encoded_length), len(tokens) - offset)):
        of_books = predictions[0][frame].view(model.quantizer.num_classes, -1)
        wanted = tokens[frame + offset].view(-1)
        surprise.append(-sum(of_books[token, book] for book, token in enumerate(wanted)) / len(wanted))
    return torch.tensor(surprise), torch.stack([log_probs.argmax(dim=1) for log_probs in predictions], dim=1)


def check(case, lengths, sizes):
    model, (_, context, offset) = model_of(case), CASES[case]
    samples = noise(len(lengths), max(lengths), seed=sum(lengths))
    session = StreamingSession(model, len(lengths), context, return_surprise=True)
    assert session.next_token_offset == offset
    output = stream(session, samples, lengths, sizes)
    for row, length in enumerate(lengths):
        if not length:
            continue
        surprise, likeliest = by_definition(model, samples[row : row + 1, :length], context, offset)
        assert output.surprise_lengths[row] == len(surprise) and output.surprise_start[row] == offset
        apart = (output.surprise[row, : len(surprise)] - surprise).abs() > 1e-4
        assert apart.sum() <= (1 if 'post conv' in case else 0)  # a token between two codes, decided by rounding
        others = output.next_tokens[row, : len(likeliest)] != likeliest
        assert others.sum() <= 1  # the same of the two likeliest tokens
        assert output.next_tokens[row, len(likeliest) :].eq(0).all()
    return output


@settings(max_examples=25)
@given(st.data())
def test_any_pieces_of_ragged_streams_equal_the_definition(data):
    case = data.draw(st.sampled_from(list(CASES)))
    check(case, *data.draw(RAGGED))


@pytest.mark.parametrize('case', CASES)
def test_chunks_of_one_frame_equal_the_definition(case):
    output = check(case, [30007, 16 * 1280], [1280])
    assert output.surprise[0].std() > 1e-3  # else agreement would say little


def test_a_token_is_known_seven_features_after_its_prediction():
    session = StreamingSession(model_of('causal'), 1, [4, 0], return_surprise=True)
    hop, known = session.frame_samples // 8, []
    for feature, samples in enumerate(noise(1, 40 * hop + 200).split([200, *[hop] * 40], dim=1)):
        output = session.step(samples)
        if feature % 8 == 0:  # feature j of the preprocessor is complete half a window after its centre
            assert int(output.lengths) == 1
        known += [(feature, int(output.surprise_start))] * int(output.surprise_lengths)
    assert known == [(7, 0), (15, 1), (23, 2), (31, 3), (39, 4)]


@pytest.mark.parametrize('case', ['causal', 'chunked, layers hear less', 'post conv, running statistics, look-ahead'])
def test_a_saved_state_goes_on_in_another_session(case, tmp_path):
    model, samples = model_of(case), noise(2, 20000)

    def session():
        return StreamingSession(model, 2, CASES[case][1], return_surprise=True)

    first, other, whole = session(), session(), session()
    parts = [first.step(samples[:, :9000], [9000, 7000])]
    torch.save(first.state_dict(), tmp_path / 'state.pt')
    first.step(samples)  # what goes on here must not reach the saved state
    other.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    parts += [other.step(samples[:, 9000:]), other.finish()]
    expected = [whole.step(samples[:, :9000], [9000, 7000]), whole.step(samples[:, 9000:]), whole.finish()]
    for mine, theirs in zip(parts, expected):
        for name in ('next_tokens', 'surprise', 'surprise_lengths', 'surprise_start'):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
    joined = StreamingOutput.concatenate(parts)
    assert joined.surprise_start.tolist() == [CASES[case][2]] * 2
    assert torch.equal(joined.surprise_lengths, sum(part.surprise_lengths for part in parts))


def test_what_waits_is_bounded():
    def bytes_after(seconds):
        session = StreamingSession(model_of('chunked'), 1, [8, 3], return_surprise=True)
        session.step(noise(1, seconds * 16000))
        assert len(session._observers.streams[0].next_log_probs) <= 4
        return session.cache_bytes_per_stream

    assert bytes_after(4) == bytes_after(12)


def test_a_model_of_both_objectives_is_masked_and_asked_at_once():
    model, samples = model_of('both'), noise(1, 48000)
    session = StreamingSession(model, 1, [10, 0], apply_mask=True, return_surprise=True)
    torch.manual_seed(0)
    output = session.step(samples, None, [True])
    assert output.masked_frames > 0 and output.loss > 0
    # the encoder hears what was masked, and is asked for clean tokens
    features, length = model.preprocessor(input_signal=samples, length=torch.tensor([48000]))
    masks = torch.nn.functional.pad(output.masks, (0, features.shape[2] - output.masks.shape[1])).unsqueeze(1)
    masked = torch.where(masks > 0, model.mask_processor.mask_embedding.view(1, -1, 1), features)
    with torch.no_grad(), model.encoder.using_att_context_size([10, 0]):
        encoded, _ = model.encoder(audio_signal=masked, length=length)
        log_probs = model.next_token_decoders[0](encoder_output=encoded)[0]
    tokens = tokens_by_definition(model, features[0, :, :length])
    expected = -log_probs[: len(tokens)].gather(1, tokens.unsqueeze(1)).flatten()
    torch.testing.assert_close(output.surprise[0], expected, atol=1e-4, rtol=0)


def test_what_cannot_be_asked_is_refused_with_the_reason():
    plain = tiny_model().eval()
    for model, reason in [
        (plain, 'model.objective next_token or both, and this EncDecDenoiseMaskedTokenPredModel has masked'),
        ((plain.preprocessor, plain.encoder), 'and this tuple has no objective'),
        (tiny_model(*NEXT, 'model.quantizer.combine_time_steps=4').eval(), 'combine_time_steps is 4; it must be 8'),
        (tiny_model(*NEXT, '+model.next_token.positions=chunk_end').eval(), 'positions is chunk_end; it must be all'),
        (tiny_model(*NEXT, 'model.encoder.conv_norm_type=batch_norm').eval(), 'conv_norm_type'),
    ]:
        with pytest.raises(ValueError, match=reason):
            StreamingSession(model, return_surprise=True)
    with pytest.raises(ValueError, match='apply_mask: model.objective is next_token, which predicts no masked tokens'):
        StreamingSession(model_of('causal'), apply_mask=True)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_watched_too(dtype):
    model = tiny_model('+model.objective=both').to(dtype).eval()
    session = StreamingSession(model, att_context_size=[10, 0], return_surprise=True, apply_mask=True)
    output = session.step(torch.randn(1, 24000, generator=torch.Generator().manual_seed(0)) * 0.1)
    assert output.encoded.dtype == dtype and output.surprise.shape[1] > 10
    assert output.surprise.isfinite().all() and output.loss.isfinite()
