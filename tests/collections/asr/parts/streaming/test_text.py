# SPDX-License-Identifier: Apache-2.0
"""The text of live streams is what NeMo decodes from the whole, at a cost that does not grow."""

import functools
import io
import pickle
from unittest import mock

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_streams import noise, stream
from omegaconf import OmegaConf
from tiny_nest import tiny_model
from tiny_recogniser import LABELS, tiny_recogniser

from nemo.collections.asr.parts.streaming import text as text_module
from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.streaming.text import (
    LiveText,
    Spelling,
    TextOptions,
    Word,
    decoder_of,
)
from nemo.collections.asr.parts.submodules.ctc_decoding import CTCBPEDecoding, CTCBPEDecodingConfig
from nemo.collections.common.tokenizers import SentencePieceTokenizer

SENTENCES = ['turn on the light', 'turn off the radio', 'the light in the garden', 'call anna at nine']
CONTEXT, FRAME = [10, 0], 0.08
LENGTHS = [40000, 17000, 29000]
KINDS = ['ctc', 'rnnt', 'hybrid']
NEVER = {'silence_after_nothing': None, 'silence_after_speech': None, 'utterance_seconds': None}
OFTEN = TextOptions(silence_after_nothing=0.3, silence_after_speech=0.16, utterance_seconds=0.5)


@functools.cache
def model_of(kind):
    return tiny_recogniser(kind)


def offline(kind, model=None):
    """Return the hypotheses of NeMo's own decoding of three whole utterances."""
    model = model_of(kind) if model is None else model
    with torch.no_grad(), model.encoder.using_att_context_size(CONTEXT):
        outputs, lengths = model(input_signal=noise(3, 40000), input_signal_length=torch.tensor(LENGTHS))[:2]
        if kind == 'ctc':
            return model.decoding.ctc_decoder_predictions_tensor(outputs, lengths, return_hypotheses=True)
        return model.decoding.rnnt_decoder_predictions_tensor(outputs, lengths, return_hypotheses=True)


def transcribe(model, sizes, options=True):
    """Stream the three utterances; each ends when its samples do, or later. Returns the session and the joined output."""
    session = StreamingSession(model, 3, CONTEXT, return_text=options)
    return session, stream(session, noise(3, 40000), LENGTHS, sizes)


@settings(max_examples=8)
@given(st.sampled_from(KINDS), st.lists(st.integers(300, 20000), min_size=1, max_size=4))
def test_any_pieces_of_ragged_streams_give_the_text_of_the_whole(kind, sizes):
    session, output = transcribe(model_of(kind), sizes)
    for row, expected in enumerate(offline(kind)):
        transcript = session.transcript(row)
        assert transcript.text == expected.text and len(expected.text) > 3
        assert [word.text for word in transcript.words] == expected.text.split()
        assert output.text[row].final_words == transcript.words


@pytest.mark.parametrize('kind', KINDS)
def test_words_and_utterances_do_not_depend_on_the_pieces(kind):
    found = []
    for sizes in ([1280], [900, 11000, 3000], [40000]):
        session, output = transcribe(model_of(kind), sizes, OFTEN)
        found.append((output.text, [session.transcript(row) for row in range(3)]))
    assert found[0] == found[1] == found[2]
    updates, transcripts = found[0]
    assert all(update.utterance_ends for update in updates)
    assert [transcript.text for transcript in transcripts] == [each.text for each in offline(kind)]
    times = [(word.start, word.end) for word in updates[0].final_words]
    assert times == sorted(times) and all(0 <= start < end <= LENGTHS[0] / 16000 + 2 * FRAME for start, end in times)


@pytest.mark.parametrize('kind', ['rnnt', 'hybrid'])
def test_tokens_have_the_frames_of_the_whole(kind):
    session, _ = transcribe(model_of(kind), [900, 11000, 3000])
    for row, expected in enumerate(offline(kind)):
        timestamp = expected.timestamp['timestep'] if isinstance(expected.timestamp, dict) else expected.timestamp
        assert session._text.streams[row].frames == [int(frame) for frame in timestamp]


def one_stream(options=TextOptions()):
    """Return a function that feeds the path of a CTC model, written as labels and "_" for blanks."""
    text = LiveText(model_of('ctc'), 1, FRAME, options)

    def feed(path, ended=False):
        classes = [len(LABELS) if label == '_' else LABELS.index(label) for label in path]
        log_probs = (
            torch.nn.functional.one_hot(torch.tensor([classes], dtype=torch.long), len(LABELS) + 1).float().log()
        )
        return text.take(torch.zeros(1, 16, len(path)), [len(path)], [ended], log_probs)[0]

    return text, feed


def summary(update):
    """Return final words, partial word and the frames where utterances ended."""
    ends = [round(seconds / FRAME) for seconds in update.utterance_ends]
    return [word.text for word in update.final_words], update.partial and update.partial.text, ends


def test_a_pause_makes_the_last_word_final():
    text, feed = one_stream(TextOptions(**{**NEVER, 'silence_after_speech': 4 * FRAME}))
    assert summary(feed('_bee__')) == ([], 'be', [])
    assert summary(feed('_')) == ([], 'be', [])
    assert summary(feed('_')) == (['be'], None, [8])
    assert summary(feed('______a')) == ([], 'a', [])
    assert summary(feed('n____ab a')) == (['an', 'ab'], 'a', [20])
    assert summary(feed('', ended=True)) == (['a'], None, [])
    assert text.transcript(0).text == 'beanab a'
    words = [('be', 1, 3), ('an', 14, 16), ('ab', 20, 22), ('a', 23, 24)]
    assert text.transcript(0).words == [Word(word, start * FRAME, end * FRAME) for word, start, end in words]


def test_silence_without_speech_and_length_end_utterances(monkeypatch):
    _, feed = one_stream(TextOptions(**{**NEVER, 'silence_after_nothing': 3 * FRAME}))
    assert summary(feed('_____')) == ([], None, [3])
    assert summary(feed('__a______')) == ([], 'a', [6])
    _, feed = one_stream(TextOptions(**{**NEVER, 'utterance_seconds': 4 * FRAME}))
    assert summary(feed('a be')) == (['a'], 'be', [])
    assert summary(feed('ne an')) == (['bene'], 'an', [6])  # not within a word
    monkeypatch.setattr(text_module, 'LONGEST_WORD', 3)
    _, feed = one_stream(TextOptions(**NEVER))
    assert summary(feed('abababa')) == (['aba', 'bab'], 'a', [])


def test_a_step_costs_the_same_after_a_second_and_after_an_hour():
    text, feed = one_stream()
    decoding = text._decoding.decoding

    def cost():
        with mock.patch.object(decoding, 'decode_ids_to_str', wraps=decoding.decode_ids_to_str) as decoded:
            updates = [feed('_be_ an_') for _ in range(3)]
        read = [len(call.args[0]) for call in decoded.call_args_list]
        return sum(read), len(read), len(pickle.dumps(updates))

    feed('be')
    before = cost()
    feed('_be_ an_' * 5000)
    assert cost() == before


@pytest.mark.parametrize('kind', KINDS)
def test_a_saved_state_goes_on_and_a_stream_begins_anew(kind):
    model, samples = model_of(kind), noise(2, 40000)
    whole, first, second = (StreamingSession(model, 2, CONTEXT, return_text=OFTEN) for _ in range(3))
    whole.step(samples[:, :15000])
    first.step(samples[:, :15000])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for session in (whole, second):
        session.reset([1])
    expected, mine = ([s.step(samples[:, 15000:]).text, s.finish().text] for s in (whole, second))
    assert mine == expected and second.transcript(0) == whole.transcript(0)
    fresh = StreamingSession(model, 1, CONTEXT, return_text=OFTEN)
    fresh.step(samples[1:, 15000:], ended=[True])
    assert second.transcript(1) == fresh.transcript(0)


@pytest.mark.parametrize(('kind', 'aggregation'), [('ctc', 'min'), ('rnnt', 'mean'), ('ctc', 'prod')])
def test_confidence_is_that_of_nemo(kind, aggregation):
    model = tiny_recogniser(kind)
    cfg = OmegaConf.create(OmegaConf.to_container(model.cfg.decoding))
    cfg.confidence_cfg = {'preserve_frame_confidence': True, 'aggregation': aggregation}
    model.change_decoding_strategy(cfg)
    options = TextOptions(**NEVER, confidence=True)
    sessions = [transcribe(model, sizes, options)[0] for sizes in ([1280], [7000, 20000])]
    cfg.confidence_cfg.preserve_token_confidence = True
    model.change_decoding_strategy(cfg)
    aggregate = model.decoding.confidence_aggregation_bank[aggregation]
    for row, expected in enumerate(offline(kind, model)):
        for session in sessions:
            stream = session._text.streams[row]
            found = stream.confidences
            assert found == pytest.approx([*map(float, expected.token_confidence)], abs=1e-5) and len(set(found)) > 3
            letters = [each for each, token in zip(found, stream.tokens) if token != LABELS.index(' ')]
            word = session.transcript(row).words[0]
            assert word.confidence == pytest.approx(aggregate(letters[: len(word.text)]))


def test_a_hybrid_model_decodes_as_its_decoder_is_set():
    model = tiny_recogniser('hybrid')
    model.cur_decoder = 'ctc'
    session, _ = transcribe(model, [1280])
    with torch.no_grad(), model.encoder.using_att_context_size(CONTEXT):
        encoded, lengths = model(input_signal=noise(3, 40000), input_signal_length=torch.tensor(LENGTHS))[:2]
        log_probs = model.ctc_decoder(encoder_output=encoded)
        expected = model.ctc_decoding.ctc_decoder_predictions_tensor(log_probs, lengths, return_hypotheses=True)
    assert [session.transcript(row).text for row in range(3)] == [each.text for each in expected]


def test_what_has_no_text_is_refused():
    with pytest.raises(ValueError, match='text needs a CTC, RNNT or hybrid model'):
        StreamingSession(tiny_model().eval(), return_text=True)
    model = tiny_recogniser('rnnt')
    with pytest.raises(ValueError, match='confidence_cfg.preserve_frame_confidence'):
        StreamingSession(model, return_text=TextOptions(confidence=True))
    model.decoding.cfg.strategy = 'beam'
    with pytest.raises(ValueError, match='decoding.strategy is beam'):
        StreamingSession(model, return_text=True)


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
    """A decoding of SentencePiece tokens, and its tokenizer."""
    folder = tmp_path_factory.mktemp('tokenizer')
    (folder / 'text.txt').write_text('\n'.join(SENTENCES * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / 'text.txt'), model_prefix=str(folder / 'tokenizer'), vocab_size=40, model_type='bpe'
    )
    tokenizer = SentencePieceTokenizer(str(folder / 'tokenizer.model'))
    tokenizer.tokenizer.vocab_size = len(tokenizer.vocab)  # as NeMo's models of such tokens do
    return CTCBPEDecoding(OmegaConf.structured(CTCBPEDecodingConfig()), tokenizer), tokenizer


def words_of(spelling, tokens, frames):
    """Cut tokens where a word begins, as text does."""
    stream = text_module._Stream(0, 0, tokens, [*frames], [0.5] * len(tokens))
    starts = [index for index, token in enumerate(tokens) if not index or spelling.begins_word(token)]
    return [spelling.word(stream, *bounds) for bounds in zip(starts, [*starts[1:], len(tokens)])]


def test_pieces_that_begin_with_a_mark_begin_words(pieces):
    decoding, tokenizer = pieces
    spelling = Spelling(decoding, 0.08)
    for sentence in SENTENCES:
        tokens = tokenizer.text_to_ids(sentence)
        assert len(tokens) > len(sentence.split())  # some words have several pieces
        words = words_of(spelling, tokens, range(0, 3 * len(tokens), 3))
        assert [word.text for word in words] == sentence.split() and spelling.text(tokens) == sentence
        assert words[0].start == 0 and words[-1].end == pytest.approx(0.08 * (3 * len(tokens) - 2))


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
