# SPDX-License-Identifier: Apache-2.0
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_streams import CASES, RAGGED, THREE_LAYERS, model_of, noise, offline, stream
from tiny_nest import tiny_model
from tiny_recogniser import tiny_recogniser

from nemo.collections.asr.parts.streaming.session import StreamingSession

RATE = 16000


def assert_equal(output, expected):
    _, _, encoded, lengths, log_probs = expected
    assert output.lengths.tolist() == lengths.tolist()
    close = functools.partial(torch.testing.assert_close, rtol=0)
    for row, length in enumerate(lengths.tolist()):
        close(output.encoded[row, :, :length], encoded[row, :, :length], atol=1e-4)
        close(output.log_probs[row, :length], log_probs[row, :length], atol=1e-4)
        assert_same_tokens(output.tokens[row, :length], log_probs[row, :length])
    assert all(output.encoded[row, :, length:].eq(0).all() for row, length in enumerate(lengths))


def assert_same_tokens(tokens, log_probs):
    """Tokens are the likeliest, but for ties that rounding decides."""
    best = log_probs.topk(2, dim=1).values
    tied = best[:, 0] - best[:, 1] < 1e-5
    assert torch.equal(tokens[~tied], log_probs.argmax(dim=1)[~tied])
    assert tied.sum() <= 1


def check(model, context, samples, lengths, sizes):
    session = StreamingSession(model, len(lengths), context, return_log_probs=True, return_tokens=True)
    output = stream(session, samples, lengths, sizes)
    assert_equal(output, offline(model, samples, lengths, context))
    return output


@settings(max_examples=25)
@given(st.data())
def test_any_pieces_of_ragged_streams_equal_offline(data):
    case = data.draw(st.sampled_from(list(CASES)))
    context = data.draw(st.sampled_from(CASES[case][1]))
    lengths, sizes = data.draw(RAGGED)
    check(model_of(case), context, noise(len(lengths), max(lengths), seed=sum(lengths)), lengths, sizes)


@pytest.mark.parametrize('case', CASES)
def test_chunks_of_one_frame_equal_offline_in_every_context(case):
    lengths = [30007, 8 * 1280 * 2]
    for context in CASES[case][1]:
        output = check(model_of(case), context, noise(2, 30007), lengths, [1280])
        assert output.tokens.unique().numel() > 3  # else their agreement would say little


@settings(max_examples=3)
@given(st.integers(10 * RATE, 20 * RATE), st.lists(st.integers(1000, 200000), min_size=1, max_size=4))
def test_long_streams_equal_offline(length, sizes):
    check(model_of('regular'), [10, 0], noise(2, length, seed=length), [length, length // 2], sizes)
    check(model_of('regular'), [-1, 0], noise(1, length, seed=length), [length], sizes)


def test_a_ctc_model_streams():
    model = tiny_recogniser('ctc')
    samples = noise(2, 20000)
    output = check(model, [4, 0], samples, [20000, 9000], [1280])
    with torch.no_grad(), model.encoder.using_att_context_size([4, 0]):
        log_probs, lengths, greedy = model(input_signal=samples, input_signal_length=torch.tensor([20000, 9000]))
    assert torch.equal(output.tokens[0, : lengths[0]], greedy[0, : lengths[0]])


def test_a_preprocessor_and_an_encoder_stream():
    model = model_of('regular')
    session = StreamingSession((model.preprocessor, model.encoder), 1, [4, 0])
    output = stream(session, noise(1, 9000), [9000], [700])
    torch.testing.assert_close(
        output.encoded, offline(model, noise(1, 9000), [9000], [4, 0])[2][..., : output.lengths], atol=1e-4, rtol=0
    )
    assert output.log_probs is None and output.tokens is None
    with pytest.raises(ValueError, match='need a decoder'):
        StreamingSession((model.preprocessor, model.encoder), return_tokens=True)


def test_state_is_bounded_where_the_context_is_and_grows_and_shrinks_where_it_is_not():
    model, encoder = model_of('regular'), model_of('regular').encoder
    table = encoder.pos_enc.pe.shape
    bounded, session = (StreamingSession(model, 1, context) for context in ([10, 0], [-1, 0]))
    sizes = []
    for seconds in (4, 8):
        for each in (bounded, session):
            each.step(noise(1, seconds * RATE))
        sizes.append((bounded.cache_bytes_per_stream, session.cache_bytes_per_stream))
    assert sizes[0][0] == sizes[1][0]
    frame, position = 3 * 2 * 16 * 4, 3 * (16 + 2) * 4  # layers, keys and values, d_model, float32; and heads
    assert sizes[1][1] - sizes[0][1] == (256 - 64) * (frame + position)  # twice as many until 150 frames fit
    assert encoder.pos_enc.pe.shape == table  # the encoder's own table stays as it is
    session.reset([0])
    session.step(noise(1, 4 * RATE))
    assert session.cache_bytes_per_stream == sizes[0][1]


def test_a_ring_without_a_limit_is_not_copied_while_it_has_room():
    session = StreamingSession(model_of('regular'), 1, [-1, 0])
    layer = session._runner.layers[0]
    before = layer.keys_values.data_ptr()
    for _ in range(3):
        session.step(noise(1, RATE // 4))
    assert layer.count[0] > 0 and layer.keys_values.data_ptr() == before


@pytest.mark.parametrize('case', ['regular', 'look-ahead', 'chunked', 'schedule, look-ahead', 'factor 4'])
def test_outputs_come_when_the_look_ahead_says(case):
    session = StreamingSession(model_of(case), 1, CASES[case][1][0])
    chunk = session._runner.chunk
    arrived, samples = [], noise(1, 14 * session.frame_samples)
    for index, sample in enumerate(samples.split(8, dim=1)):
        arrived += [(index + 1) * 8] * int(session.step(sample).lengths)
    waits = [at - frame * session.frame_samples for frame, at in enumerate(arrived)]
    assert len(arrived) > chunk and max(waits) == waits[0] == session.look_ahead_samples


def test_current_frame_counts_the_frames_received():
    session = StreamingSession(model_of('regular'), 2, [4, 0])
    output = session.step(noise(2, 3200), [3200, 1600], [False, True])
    assert output.current_frame.tolist() == [19, 10]  # the 20th needs the samples to its right; an end does not wait
    assert session.step(noise(2, 1600)).current_frame.tolist() == [29, 10]
    after_convolutions = StreamingSession(model_of('post conv'), 1, [4, 0])
    assert after_convolutions.step(noise(1, 3200)).current_frame.tolist() == [3]


def test_wrong_use_is_refused():
    model = model_of('regular')
    session = StreamingSession(model, 2, [4, 0])
    for samples, reason in [
        (torch.zeros(1, 10), r'\[1, 10\]; they must be a tensor \[2, n\]'),
        (torch.zeros(2, 10, dtype=torch.int16), 'samples are torch.int16'),
    ]:
        with pytest.raises(ValueError, match=reason):
            session.step(samples)
    with pytest.raises(ValueError, match=r'lengths\[0\] is 11'):
        session.step(torch.zeros(2, 10), [11, 0])
    with pytest.raises(ValueError, match='ended are .*one for each stream'):
        session.step(torch.zeros(2, 10), None, [True])
    session.step(torch.zeros(2, 10), None, [True, False])
    with pytest.raises(ValueError, match='stream 0 has ended'):
        session.step(torch.zeros(2, 10), [10, 10])
    session.finish()
    for work in (session.finish, lambda: session.step(torch.zeros(2, 10))):
        with pytest.raises(ValueError, match='every stream has ended'):
            work()


def test_wrong_settings_are_refused():
    model = model_of('regular')
    with pytest.raises(ValueError, match='batch_size is 0'):
        StreamingSession(model, 0)
    with pytest.raises(ValueError, match='has no preprocessor and encoder'):
        StreamingSession(model.encoder)
    with pytest.raises(ValueError, match='apply_mask needs a masked token prediction model'):
        StreamingSession(tiny_recogniser('ctc'), apply_mask=True)
    with pytest.raises(ValueError, match='training mode'):
        StreamingSession(tiny_model().train())


def test_sessions_of_a_model_run_in_several_threads_at_once_and_leave_nothing_in_it():
    model, contexts = model_of('regular'), ([4, 0], [-1, 0], [6, 2], [10, 0])
    encoder, samples = model.encoder, noise(4, 40000)
    before = encoder.att_context_size, vars(encoder.streaming_cfg).copy(), encoder.layers[0].self_attn.cache_drop_size

    def run(row):
        session = StreamingSession(model, 1, contexts[row])
        return stream(session, samples[row : row + 1], [40000], [700])

    alone = [run(row) for row in range(4)]
    for _ in range(3):
        with ThreadPoolExecutor(4) as threads:
            for mine, expected in zip(threads.map(run, range(4)), alone):
                assert torch.equal(mine.encoded, expected.encoded)
    after = encoder.att_context_size, vars(encoder.streaming_cfg), encoder.layers[0].self_attn.cache_drop_size
    assert after == before and encoder.att_context_override is None


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_streams(dtype, tolerance):
    model = tiny_model(THREE_LAYERS).to(dtype).eval()
    expected = offline(tiny_model(THREE_LAYERS).eval(), noise(2, 20000), [20000, 9000], [4, 0])[2]
    session = StreamingSession(model, 2, [4, 0], return_tokens=True)
    output = stream(session, noise(2, 20000), [20000, 9000], [1280])
    assert output.encoded.dtype == dtype
    for row, length in enumerate(output.lengths.tolist()):
        difference = output.encoded[row, :, :length].float() - expected[row, :, :length]
        assert difference.abs().mean() < tolerance


@pytest.mark.parametrize('weights, near', [('bfloat16', 0.03), ('int8', 0.1)])
def test_smaller_weights_give_nearly_the_same(weights, near, no_small_weights):
    model, samples = model_of('regular'), noise(2, 20000)
    whole, small = (
        stream(StreamingSession(model, 2, [4, 0], weights=each), samples, [20000, 9000], [1280])
        for each in ('float32', weights)
    )
    assert small.lengths.tolist() == whole.lengths.tolist()
    assert 0 < (small.encoded - whole.encoded).norm() / whole.encoded.norm() < near
