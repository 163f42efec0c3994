# SPDX-License-Identifier: Apache-2.0
"""The text of live streams is what NeMo's decoding makes of the whole."""

import functools
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_streams import noise
from tiny_nest import tiny_model
from tiny_recogniser import tiny_recogniser

from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.streaming.transcriber import StreamingTranscriber

CONTEXT, FRAME = [10, 0], 0.08
LENGTHS = [40000, 17000, 29000]
KINDS = ['ctc', 'rnnt', 'hybrid']


@functools.cache
def model_of(kind):
    return tiny_recogniser(kind)


@functools.cache
def offline(kind):
    """Return the hypotheses of NeMo's own decoding of three whole utterances."""
    model = model_of(kind)
    with torch.no_grad(), model.encoder.using_att_context_size(CONTEXT):
        outputs, lengths = model(input_signal=noise(3, 40000), input_signal_length=torch.tensor(LENGTHS))[:2]
        if kind == 'ctc':
            return model.decoding.ctc_decoder_predictions_tensor(outputs, lengths, return_hypotheses=True)
        return model.decoding.rnnt_decoder_predictions_tensor(outputs, lengths, return_hypotheses=True)


def transcribe(transcriber, sizes, samples=None):
    """Stream the three utterances; each ends when its samples do, or later."""
    samples, position, index = noise(3, 40000) if samples is None else samples, 0, 0
    seen = []
    while position < max(LENGTHS):
        size = sizes[index % len(sizes)]
        counts = [max(min(length - position, size), 0) for length in LENGTHS]
        ended = [index % 2 == 0 and 0 <= length - position <= size for length in LENGTHS]
        seen.append(transcriber.step(samples[:, position : position + size], counts, ended))
        position, index = position + size, index + 1
    if not all(transcriber.session.ended):
        seen.append(transcriber.finish())
    return seen


@settings(max_examples=12)
@given(st.sampled_from(KINDS), st.lists(st.integers(300, 20000), min_size=1, max_size=4))
def test_any_pieces_of_ragged_streams_give_the_text_of_the_whole(kind, sizes):
    transcripts = transcribe(StreamingTranscriber(model_of(kind), 3, CONTEXT), sizes)[-1]
    for transcript, expected in zip(transcripts, offline(kind)):
        assert transcript.text == expected.text and transcript.final
        assert len(transcript.text) > 3
        said = ' '.join(word.text for word in transcript.words)
        assert said == ' '.join(expected.text.split())


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_said_stays_said_and_words_have_their_times(kind):
    seen = transcribe(StreamingTranscriber(model_of(kind), 3, CONTEXT), [1280])
    for row in range(3):
        mine = [step[row] for step in seen]
        for earlier, later in zip(mine, mine[1:]):
            assert later.text.startswith(earlier.text)
            assert later.words[: len(earlier.final_words)] == earlier.final_words
        times = [(word.start, word.end) for word in mine[-1].words]
        assert times == sorted(times) and all(
            0 <= start < end <= LENGTHS[row] / 16000 + 2 * FRAME for start, end in times
        )


@pytest.mark.parametrize('kind', ['rnnt', 'hybrid'])
def test_tokens_have_the_frames_of_the_whole(kind):
    transcriber = StreamingTranscriber(model_of(kind), 3, CONTEXT)
    transcribe(transcriber, [900, 11000, 3000])
    for tokens, expected in zip(transcriber.session._text._tokens, offline(kind)):
        timestamp = expected.timestamp['timestep'] if isinstance(expected.timestamp, dict) else expected.timestamp
        assert [token.frame for token in tokens] == [int(frame) for frame in timestamp]


@pytest.mark.parametrize('kind', KINDS)
def test_a_saved_state_goes_on_and_a_stream_begins_anew(kind):
    model, samples = model_of(kind), noise(2, 40000)
    whole, first, second = (StreamingTranscriber(model, 2, CONTEXT) for _ in range(3))
    whole.step(samples[:, :15000])
    first.step(samples[:, :15000])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for transcriber in (whole, second):
        transcriber.reset([1])
    expected, mine = ([*t.step(samples[:, 15000:]), *t.finish()] for t in (whole, second))
    assert mine == expected
    fresh = StreamingTranscriber(model, 1, CONTEXT)
    fresh.step(samples[1:, 15000:])
    assert mine[3].text == fresh.finish()[0].text


def test_a_hybrid_model_decodes_as_it_is_told():
    model = tiny_recogniser('hybrid')
    model.cur_decoder = 'ctc'
    transcripts = transcribe(StreamingTranscriber(model, 3, CONTEXT), [1280])[-1]
    with torch.no_grad(), model.encoder.using_att_context_size(CONTEXT):
        encoded, lengths = model(input_signal=noise(3, 40000), input_signal_length=torch.tensor(LENGTHS))[:2]
        log_probs = model.ctc_decoder(encoder_output=encoded)
        expected = model.ctc_decoding.ctc_decoder_predictions_tensor(log_probs, lengths, return_hypotheses=True)
    assert [transcript.text for transcript in transcripts] == [each.text for each in expected]


def test_what_has_no_text_is_refused():
    with pytest.raises(ValueError, match='text needs a CTC, RNNT or hybrid model'):
        StreamingSession(tiny_model().eval(), return_text=True)
    model = tiny_recogniser('rnnt')
    model.decoding.cfg.strategy = 'beam'
    with pytest.raises(ValueError, match='decoding.strategy is beam; live text needs greedy'):
        StreamingTranscriber(model)
    silent = StreamingSession(model_of('ctc'), 1, CONTEXT)
    with pytest.raises(ValueError, match='another return_text'):
        StreamingTranscriber(model_of('ctc'), 1, CONTEXT).load_state_dict(silent.state_dict())
