# SPDX-License-Identifier: Apache-2.0
"""Streams that cannot hurt each other: bad samples, errors in the middle of a step, and states that do not fit."""

import copy

import pytest
import torch
from live_streams import calls_of, check_row, model_of, noise
from tiny_nest import tiny_model
from tiny_recogniser import tiny_recogniser

from nemo.collections.asr.parts.streaming import session as session_module
from nemo.collections.asr.parts.streaming.session import StreamingSession

BAD = [1e25, 1e38, -3e38]
CONTEXTS = [('regular', [4, 0]), ('look-ahead', [6, 2]), ('regular', [-1, 0]), ('chunked', [8, 3])]
EACH_CONTEXT = pytest.mark.parametrize('case, context', CONTEXTS, ids=str)


def pieces_of(samples, size=1700):
    return samples.split(size, dim=1)


def frames_of(outputs, row):
    return [output.encoded[row, :, : output.lengths[row]] for output in outputs]


@EACH_CONTEXT
@pytest.mark.parametrize('bad', BAD)
def test_a_stream_that_is_not_finite_fails_alone_and_leaves_nothing_behind(case, context, bad):
    model, samples = model_of(case), noise(3, 17000)
    session, whole = (StreamingSession(model, 3, context) for _ in range(2))
    outputs = []
    for index, piece in enumerate(pieces_of(samples)):
        expected = whole.step(piece)
        if index == 2:
            piece = piece.clone()
            piece[1, 100:] = bad
        outputs.append(session.step(piece))
        for row in (0, 2):
            assert outputs[-1].lengths[row] == expected.lengths[row]
            assert torch.equal(outputs[-1].encoded[row], expected.encoded[row])
    assert 'NaN or infinite' in outputs[-1].failed[1] and outputs[-1].failed.keys() == {1} and not outputs[1].failed
    assert outputs[-1].lengths[1] == 0 and all(output.encoded.isfinite().all() for output in outputs)
    session.reset([1])
    again = noise(1, 9000, seed=7)
    outputs = [session.step(torch.cat((noise(1, 9000), again, noise(1, 9000)))), session.finish()]
    assert not outputs[0].failed
    check_row(model, context, again, frames_of(outputs, 1))


@EACH_CONTEXT
def test_a_reset_clears_what_was_not_given_out_yet(case, context):
    model, again = model_of(case), noise(1, 9000, seed=7)
    session = StreamingSession(model, 2, context)
    session.step(noise(2, 5000))
    session.step(torch.full((2, 300), 1e25) * torch.tensor([[0.0], [1.0]]))  # too few for a frame
    session.reset([1])
    outputs = [session.step(again.repeat(2, 1)), session.finish()]
    assert not outputs[0].failed and not outputs[1].failed
    check_row(model, context, again, frames_of(outputs, 1))


def test_samples_that_are_no_numbers_are_refused_and_nothing_is_taken():
    model, samples = model_of('regular'), noise(2, 9000)
    session = StreamingSession(model, 2, [4, 0])
    outputs = [session.step(samples[:, :4000])]
    for value in (float('nan'), float('inf')):
        bad = samples[:, 4000:].clone()
        bad[1, 17] = value
        with pytest.raises(ValueError, match='stream 1'):
            session.step(bad)
        session.step(bad[:, 17:], [0, 0])  # behind the lengths nothing is read
    outputs += [session.step(samples[:, 4000:]), session.finish()]
    for row in range(2):
        check_row(model, [4, 0], samples[row : row + 1], frames_of(outputs, row))


def test_a_failed_stream_does_not_count_in_the_loss():
    model = tiny_model('model.masking.mask_prob=0.1').eval()
    losses = []
    for scale in (1.0, 1e25):
        torch.manual_seed(0)
        session = StreamingSession(model, 2, [20, 0], apply_mask=True)
        samples = noise(1, 32000)
        torch.manual_seed(1)
        output = session.step(torch.cat((samples, noise(1, 32000, seed=1) * scale)))
        losses.append(output)
    assert losses[1].loss.isfinite() and 0 < losses[1].masked_frames < losses[0].masked_frames


@pytest.mark.parametrize('neighbour', [1e-3, 1.0, 7.0])
def test_int8_streams_do_not_depend_on_their_neighbours(neighbour, no_small_weights):
    model, samples = model_of('regular'), noise(1, 12000)
    outputs = []
    for other in (noise(1, 12000, seed=1), noise(1, 12000, seed=2) * neighbour):
        session = StreamingSession(model, 2, [4, 0], weights='int8')
        outputs.append(torch.cat([session.step(torch.cat((samples, other))[:, :6000]).encoded[0]], dim=1))
    assert torch.equal(*outputs)


ERRORS = [RuntimeError('out of memory'), KeyboardInterrupt()]


def fail_in_a_layer(monkeypatch, session, error):
    monkeypatch.setattr(session._runner.layers[1].layer, 'step', raising(error))


def fail_in_the_decoder(monkeypatch, session, error):
    monkeypatch.setattr(session_module, 'decode_frames', raising(error))


def fail_in_the_features(monkeypatch, session, error):
    monkeypatch.setattr(session._runner.mel, 'frames', raising(error))


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize('error', ERRORS, ids=['error', 'interrupt'])
@pytest.mark.parametrize('fail', [fail_in_a_layer, fail_in_the_decoder, fail_in_the_features])
def test_a_step_that_fails_breaks_its_streams_and_no_others(fail, error, monkeypatch):
    model, samples, context = model_of('look-ahead'), noise(3, 16000), [6, 2]
    session = StreamingSession(model, 3, context, return_tokens=True)
    outputs = [session.step(samples[:, :6000])]
    saved = session.state_dict()
    with monkeypatch.context() as patch:
        fail(patch, session, error)
        with pytest.raises(type(error)):
            session.step(samples[:, 6000:9000], [3000, 0, 3000])
    for work in (
        lambda: session.step(samples[:, 6000:9000]),
        session.finish,
        session.state_dict,
        lambda: session.export(2),
    ):
        with pytest.raises(ValueError, match='is broken by an error'):
            work()
    outputs.append(session.step(samples[:, 6000:], [0, 10000, 0], [False, True, False]))
    check_row(model, context, samples[1:2], frames_of(outputs, 1))
    session.load(0, saved['streams'][0])
    session.reset([2])
    rest = [session.step(samples[:, 6000:], [10000, 0, 10000]), session.finish()]
    check_row(model, context, samples[:1], frames_of([outputs[0], *rest], 0))
    check_row(model, context, samples[2:, 6000:], frames_of(rest, 2))
    session.load_state_dict(saved)
    rest = [session.step(samples[:, 6000:]), session.finish()]
    for row in range(3):
        check_row(model, context, samples[row : row + 1], frames_of([outputs[0], *rest], row))


def test_a_reset_is_checked_before_anything_is_changed():
    session = StreamingSession(model_of('regular'), 2, [4, 0])
    session.step(noise(2, 3000), None, [True, False])
    for rows in ([0, 7], [0, -1], [0, 1.5], [0, True], 2):
        with pytest.raises(ValueError, match='reset: there is no stream'):
            session.reset(rows)
    assert session.ended == (True, False)
    session.reset(0)
    assert session.ended == (False, False) and session.current_frame.tolist() == [0, 18]


@pytest.mark.parametrize('context', [[4, 0], [-1, 0]])
def test_a_session_made_and_loaded_in_inference_mode_goes_on_outside(context):
    model, samples = model_of('regular'), noise(2, 20000)
    with torch.inference_mode():
        session = StreamingSession(model, 2, context)
        session.step(samples)
        session.load_state_dict(session.state_dict())
    session.reset([0])
    outputs = [session.step(samples, [20000, 0])]
    session.load(1, session.export(0))
    outputs.append(session.finish())
    check_row(model, context, samples[:1], frames_of(outputs, 0))
    assert torch.equal(outputs[1].encoded[0], outputs[1].encoded[1])
    assert not outputs[0].encoded.is_inference()


@EACH_CONTEXT
def test_a_stream_moves_between_sessions_of_other_sizes(case, context, tmp_path):
    model, samples = model_of(case), noise(4, 30000)
    sessions = [StreamingSession(model, size, context) for size in (4, 1, 9)]
    outputs = [sessions[0].step(samples[:, :9000], [9000, 7000, 9000, 5000])]
    frames = frames_of(outputs, 1)
    position, row, before = 7000, 1, sessions[0]
    for session, place in ((sessions[1], 0), (sessions[2], 5), (sessions[0], 3)):
        state = before.export(row)
        torch.save(state, tmp_path / 'stream.pt')
        session.load(place, torch.load(tmp_path / 'stream.pt', weights_only=True))
        moved = session.export(place)
        assert all(same(*pair) for pair in zip(moved['stages'], state['stages'], strict=True))
        piece = samples[1:2, position : position + 4000].repeat(session.batch_size, 1)
        lengths = [4000 if other == place else 0 for other in range(session.batch_size)]
        frames += frames_of([session.step(piece, lengths)], place)
        position, row, before = position + 4000, place, session
    ends = [other == row for other in range(4)]
    frames += frames_of([before.step(torch.zeros(4, 0), None, ends)], row)
    check_row(model, context, samples[1:2, :position], frames)


def test_a_short_stream_loaded_beside_a_long_one_leaves_it_its_past():
    model, samples = model_of('regular'), noise(1, 16000 * 24)
    session, short = (StreamingSession(model, size, [-1, 0]) for size in (2, 1))
    short.step(samples[:, :8000])
    outputs = [session.step(samples.repeat(2, 1)[:, :320000], [320000, 0])]
    session.load(1, short.export(0))
    outputs += [session.step(samples.repeat(2, 1)[:, 320000:], [64000, 0]), session.finish()]
    check_row(model, [-1, 0], samples, frames_of(outputs, 0))


def test_a_reset_takes_an_encoder_and_a_vocabulary_that_were_exchanged():
    model, samples = tiny_model('model.encoder.n_layers=3').eval(), noise(1, 9000)
    session = StreamingSession(model, 1, [4, 0])
    model.encoder = tiny_model('model.encoder.n_layers=3', seed=5).eval().encoder
    session.reset()
    check_row(model, [4, 0], samples, frames_of([session.step(samples), session.finish()], 0))
    recogniser = tiny_recogniser('ctc')
    session = StreamingSession(recogniser, 1, [4, 0], return_log_probs=True, return_text=True)
    recogniser.change_vocabulary(['x', 'y'])
    recogniser.eval()
    session.reset()
    assert session.step(samples).log_probs.shape[2] == 3


def test_text_of_another_decoder_is_refused():
    model = tiny_recogniser('hybrid')
    rnnt = StreamingSession(model, 1, [4, 0], return_text=True)
    rnnt.step(noise(1, 9000))
    model.cur_decoder = 'ctc'
    with pytest.raises(ValueError, match='return_text .GreedyRNNT.*here GreedyCTC'):
        StreamingSession(model, 1, [4, 0], return_text=True).load(0, rnnt.export(0))


def test_a_state_whose_parts_disagree_is_refused():
    text = StreamingSession(tiny_recogniser('ctc'), 1, [4, 0], return_text=True)
    text.step(noise(1, 9000))
    unlimited = StreamingSession(model_of('regular'), 1, [-1, 0])
    unlimited.step(noise(1, 9000))
    for session, part, key, longer, reason in [
        (text, -1, 'tokens', lambda tokens: [*tokens, 1], 'tokens, frames and confidences differ'),
        (unlimited, -1, 'count', lambda count: count + 1, 'keys of 7 frames, and 8 have come'),
    ]:
        state = session.export(0)
        state['stages'][part][key] = longer(state['stages'][part][key])
        with pytest.raises(ValueError, match=reason):
            session.load(0, state)


def same(mine, theirs) -> bool:
    """Whether two states of a stage are the same, bit for bit."""
    tensors = [name for name, value in mine.items() if isinstance(value, torch.Tensor)]
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in tensors)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    model, samples = model_of('regular'), noise(1, 9000)
    session = StreamingSession(model, 1, [4, 0])
    outputs = [session.step(samples[:, :4000])]
    state = session.export(0)
    damaged = copy.deepcopy(state)
    damaged['stages'][-1]['keys_values'] = torch.zeros(2, 2, 3, 8)
    short, other = copy.deepcopy(state), copy.deepcopy(state)
    del short['stages'][3]
    del other['stages'][-1]['convolution']
    cases = [
        (StreamingSession(model, 1, [8, 0]).export(0), r'att_context_size \(\[8, 0\], here \[4, 0\]\)'),
        (
            StreamingSession(tiny_model('model.encoder.n_layers=3', seed=5).eval(), 1, [4, 0]).export(0),
            'another encoder',
        ),
        (StreamingSession(tiny_model('model.encoder.n_layers=3').half().eval(), 1, [4, 0]).export(0), 'dtype'),
        (StreamingSession(model, 1, [4, 0], weights='int8').export(0), 'weights'),
        (StreamingSession(model, 1, [4, 0], apply_mask=True).export(0), r'apply_mask \(True, here False\)'),
        (session.state_dict(), 'no state of a StreamingSession'),
        (damaged, 'LayerStage.keys_values is torch.float32'),
        (short, 'stages is'),
        (other, 'LayerStage is .*must be like .*convolution'),
        ({}, 'no state of a StreamingSession'),
    ]
    for given, reason in cases:
        with pytest.raises(ValueError, match=reason):
            session.load(0, given)
    with pytest.raises(ValueError, match='of 2 streams; this session has 1'):
        session.load_state_dict(StreamingSession(model, 2, [4, 0]).state_dict())
    for given in (None, {'streams': None}):
        with pytest.raises(ValueError, match='of 0 streams; this session has 1'):
            session.load_state_dict(given)
    outputs += [session.step(samples[:, 4000:]), session.finish()]
    check_row(model, [4, 0], samples, frames_of(outputs, 0))


def test_a_little_sound_in_a_large_buffer_costs_what_the_sound_costs():
    session = StreamingSession(model_of('regular'), 1, [4, 0])
    for _ in range(20):
        session.step(noise(1, 1280))
    small = calls_of(lambda: session.step(noise(1, 1280), [1280]))
    assert calls_of(lambda: session.step(noise(1, 160000), [1280])) < small + 10


@pytest.mark.parametrize('batch', [1, 9, 40])
def test_a_backlog_is_pushed_some_frames_at_a_time(batch):
    session = StreamingSession(model_of('regular'), batch, [4, 0])
    for _ in range(20):
        session.step(noise(batch, 4 * 1280))
    one = calls_of(lambda: session.step(noise(batch, 1280)))
    assert calls_of(lambda: session.step(noise(batch, 16 * 1280))) < 8 * one


def test_tokens_and_text_run_the_decoder_once():
    session = StreamingSession(tiny_recogniser('ctc').eval(), 1, [4, 0], return_tokens=True, return_text=True)
    runs = []
    session._decoder.register_forward_hook(lambda *_: runs.append(1))
    session.step(noise(1, 6000))
    assert len(runs) == 1


def test_another_sample_rate_is_refused_and_loud_samples_warn_once(monkeypatch):
    model, warnings = model_of('regular'), []
    assert StreamingSession(model, 1, [4, 0], sample_rate=16000).sample_rate == 16000
    with pytest.raises(ValueError, match='sample_rate is 8000; the model takes 16000'):
        StreamingSession(model, 1, [4, 0], sample_rate=8000)
    monkeypatch.setattr(session_module.logging, 'warning', warnings.append)
    session = StreamingSession(model, 2, [4, 0])
    session.step(noise(2, 3000))
    assert not warnings
    for _ in range(2):
        session.step(noise(2, 3000) * 30000)
    assert len(warnings) == 1
