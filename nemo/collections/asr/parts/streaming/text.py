# SPDX-License-Identifier: Apache-2.0
"""The text of live streams: greedy decoding that is never revised, words, and ends of utterances.

Shapes: B streams, R rows of them, D the encoder's width, A attention frames, C classes, H codebooks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo.collections.asr.parts.streaming.state import StreamStates
from nemo.collections.asr.parts.submodules.transducer_decoding.label_looping_base import LabelLoopingStateItem
from nemo.collections.asr.parts.utils.rnnt_utils import Hypothesis

NO_CONFIDENCE = float('nan')
SPACE, WORD_START, CONTINUES = ' ', '▁', '##'  # the marks of characters, of SentencePiece, and of word pieces
LONGEST_WORD = 64  # tokens after which a word is final, for languages without spaces


@dataclass(frozen=True)
class Word:
    """A word of a live stream; ``start`` and ``end`` are seconds from the start of the stream.

    The end is that of the frame of the last token. Confidence, from 0 to 1, comes with ``TextOptions.confidence``.
    """

    text: str
    start: float
    end: float
    confidence: float | None = None


NO_WORD = Word('', 0.0, 0.0)


@dataclass
class TextUpdate:
    """What a step adds to the text of a stream: final words, and ends of utterances in seconds.

    The partial word can still grow.
    """

    final_words: list[Word]
    partial: Word | None = None
    utterance_ends: list[float] = field(default_factory=list)

    @classmethod
    def concatenate(cls, updates: Sequence['TextUpdate']) -> 'TextUpdate':
        """Join the updates of consecutive steps."""
        words = [word for update in updates for word in update.final_words]
        return cls(words, updates[-1].partial, [end for update in updates for end in update.utterance_ends])


@dataclass
class Transcript:
    """All text of a stream so far: what NeMo decodes from its tokens, and its words."""

    text: str
    words: list[Word]


@dataclass(frozen=True)
class TextOptions:
    """How text is made. An utterance's end makes its last word final, and does not change the transcript."""

    silence_after_nothing: float | None = 2.4  # seconds that end an utterance without a token; None: never
    silence_after_speech: float | None = 1.2  # seconds after a token that end an utterance; None: never
    utterance_seconds: float | None = 20.0  # a longer utterance ends with its present word; None: never
    confidence: bool = False  # whether words have one, computed as NeMo's ``decoding.confidence_cfg`` is set

    def __post_init__(self) -> None:
        for name in ('silence_after_nothing', 'silence_after_speech', 'utterance_seconds'):
            if (value := getattr(self, name)) is not None and not 0 < value < float('inf'):
                raise ValueError(f"TextOptions.{name} is {value!r}; it must be above 0 seconds, or None")


def decoder_of(model: Any) -> torch.nn.Module:
    """Return the decoder that takes encoder frames alone, a hybrid model's CTC one; or ValueError."""
    predictor = getattr(model, 'objectives', model)
    decoder = getattr(predictor, 'ctc_decoder', None) or getattr(predictor, 'decoder', None)
    if 'encoder_output' not in (getattr(decoder, 'input_types', None) or {}):
        kind = type(model).__name__
        raise ValueError(f"log-probabilities and tokens need a decoder that takes encoder_output; {kind} has none")
    return decoder


def decode_frames(decoder: torch.nn.Module, encoded: Tensor) -> Tensor:
    """Return the log-probabilities [B, A, C] or [B, A, C, H] of frames [B, D, A]; A may be 0."""
    if encoded.shape[2]:
        return decoder(encoder_output=encoded)
    # a convolution takes no empty input; the classes are the same for any frame
    return decoder(encoder_output=encoded.new_zeros(*encoded.shape[:2], 1))[:, :0]


class Token(NamedTuple):
    """A token of greedy decoding."""

    token: int
    frame: int  # attention frame of the stream
    confidence: float = NO_CONFIDENCE  # of the token in this frame
    repeats: bool = False  # whether a CTC path repeats the token of the frame before


Decoded = tuple[list[list[Token]], list[Any]]  # the new tokens and the new memory of each row


class GreedyCTC:
    """Greedy CTC decoding with NeMo's ``decoding``; the memory of a stream is the class of its last frame."""

    def __init__(self, model: Any, decoding: Any, confidence: bool):
        self.decoder, self.decoding = decoder_of(model), decoding
        self.start = self.decoder.num_classes_with_blank - 1  # the blank
        self._confidence = decoding.decoding._get_confidence_tensor if confidence else None

    def decode(self, encoded: Any, counts: Any, memory: Any, first: Any, log_probs: Any = None) -> Decoded:
        """Decode frames [R, D, A], of which each row has ``counts``, from frame ``first`` of its stream.

        Memory is ``start`` at the start of a stream; ``log_probs`` [R, A, C] are there where the decoder has run already.
        """
        log_probs = decode_frames(self.decoder, encoded) if log_probs is None else log_probs
        paths = log_probs.argmax(dim=2).cpu().numpy()
        confidence = None if self._confidence is None else self._confidence(log_probs).cpu().numpy()
        found = []
        for row, count in enumerate(counts):
            path = paths[row, :count]
            repeats = path == np.concatenate(([memory[row]], path[:-1]))
            frames = np.flatnonzero(path != self.start)
            sure = [NO_CONFIDENCE] * len(frames) if confidence is None else confidence[row, frames].tolist()
            positions: list[int] = (first[row] + frames).tolist()
            found.append([*map(Token, path[frames].tolist(), positions, sure, repeats[frames].tolist())])
        return found, [int(paths[row, count - 1]) for row, count in enumerate(counts)]


class GreedyRNNT:
    """Greedy RNNT and TDT decoding by NeMo; a stream's memory is a hypothesis with the predictor's state."""

    start = Hypothesis(0.0, [], timestamp=[])

    def __init__(self, decoding: Any, confidence: bool):
        self.decoding, self._confidence = decoding, confidence
        if confidence and not decoding.preserve_frame_confidence:
            key = 'model.decoding.confidence_cfg.preserve_frame_confidence'
            raise ValueError(f"TextOptions.confidence is true, which needs {key}: true; use change_decoding_strategy")

    def decode(self, encoded: Any, counts: Any, memory: Any, first: Any, log_probs: Any = None) -> Decoded:
        """Decode new frames; arguments are those of :meth:`GreedyCTC.decode`."""
        lengths = torch.tensor(counts, device=encoded.device)
        earlier = [None if each is None or each.dec_state is None else _continued(each) for each in memory]
        hypotheses = self.decoding.rnnt_decoder_predictions_tensor(encoded, lengths, True, earlier)
        return [*map(self._tokens, hypotheses, first)], [*map(_continued, hypotheses)]

    def _tokens(self, hypothesis: Hypothesis, first: int) -> list[Token]:
        timestamp = hypothesis.timestamp
        frames = [int(frame) for frame in (timestamp['timestep'] if isinstance(timestamp, dict) else timestamp)]
        if hasattr(hypothesis.dec_state, 'decoded_length'):  # label looping counts from the start of the stream
            frames = [frame - first for frame in frames]
        tokens, positions = [int(token) for token in hypothesis.y_sequence], [first + frame for frame in frames]
        if not self._confidence:
            return [*map(Token, tokens, positions)]
        hypothesis.timestamp = frames  # by which NeMo finds confidences
        return [*map(Token, tokens, positions, map(float, hypothesis.non_blank_frame_confidence))]


def _continued(memory: Hypothesis) -> Hypothesis:
    """Return a hypothesis without tokens that continues another; NeMo adds to the one that it is given."""
    state = memory.dec_state
    state = LabelLoopingStateItem(**state) if isinstance(state, dict) else state  # of an exported stream
    return Hypothesis(0.0, [], timestamp=[], dec_state=state, last_token=memory.last_token)


def greedy_decoding(model: Any, confidence: bool) -> GreedyCTC | GreedyRNNT:
    """Return a decoder of a model's frames; ValueError if it is no recogniser or not greedy."""
    transducer = getattr(model, 'joint', None) is not None and getattr(model, 'cur_decoder', 'rnnt') == 'rnnt'
    decoding = None if transducer else getattr(model, 'ctc_decoding', None)
    decoding = decoding or getattr(model, 'decoding', None)
    if decoding is None:
        raise ValueError(f"text needs a CTC, RNNT or hybrid model; {type(model).__name__} is none of them")
    strategy = decoding.cfg.get('strategy', 'greedy')
    if strategy not in ('greedy', 'greedy_batch'):
        raise ValueError(f"decoding.strategy is {strategy}; text of live streams needs greedy or greedy_batch")
    return GreedyRNNT(decoding, confidence) if transducer else GreedyCTC(model, decoding, confidence)


@dataclass
class _Stream:
    """Tokens of one stream, and where its words and utterances begin; positions are frames of the stream."""

    memory: Any  # of the decoding
    received: int = 0
    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    words: list[int] = field(default_factory=list)  # index of the first token of each final word
    open: int = 0  # index of the first token of the word that can still grow
    repeated: int = 1  # frames of the last token, of a CTC path
    start: int = 0  # where the utterance begins
    partial: Word = NO_WORD

    @property
    def spoken(self) -> int:
        """Where the last token ends; in an utterance without tokens that is not after its start."""
        return self.frames[-1] + self.repeated if self.frames else 0


class Spelling:
    """Reads tokens with a ``decoding`` of NeMo: characters, SentencePiece, or word pieces."""

    def __init__(self, decoding: Any, frame_seconds: float):
        self.decoding, self.frame_seconds = decoding, frame_seconds
        tokenizer = getattr(decoding, 'tokenizer', None)
        marks_starts = any(str(piece).startswith(WORD_START) for piece in getattr(tokenizer, 'vocab', ()))
        self._mark = SPACE if tokenizer is None else WORD_START if marks_starts else CONTINUES
        self._piece = cache(lambda token: decoding.decode_ids_to_tokens([token])[0])
        self.aggregate = decoding.confidence_aggregation_bank[decoding.word_confidence_aggregation]

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        return self.decoding.decode_ids_to_str(tokens) if tokens else ''

    def begins_word(self, token: int) -> bool:
        """Return whether a token begins a word; a space belongs to the word after it."""
        return self._piece(token).startswith(self._mark) != (self._mark == CONTINUES)

    def word(self, stream: _Stream, first: int, end: int) -> Word:
        """Return the word of a stream's tokens from ``first`` to ``end``, without text if they are blank."""
        first += len([*takewhile(lambda token: self._piece(token) == self._mark == SPACE, stream.tokens[first:end])])
        text = self.text(stream.tokens[first:end]).strip()
        if not text:
            return NO_WORD
        sure = self.aggregate(stream.confidences[first:end])
        start, stop = stream.frames[first] * self.frame_seconds, (stream.frames[end - 1] + 1) * self.frame_seconds
        return Word(text, start, stop, None if sure != sure else sure)


class LiveText(StreamStates):
    """Turns encoder frames into text as they come; ValueError if the model cannot, with the reason."""

    def __init__(self, model: Any, batch: int, frame_seconds: float, options: TextOptions, device: Any = 'cpu'):
        self.frame_seconds = frame_seconds
        self._decoding = greedy_decoding(model, options.confidence)
        self._spelling = Spelling(self._decoding.decoding, frame_seconds)
        self._after_nothing, self._after_speech, self._longest = (
            None if seconds is None else max(round(seconds / frame_seconds), 1)
            for seconds in (options.silence_after_nothing, options.silence_after_speech, options.utterance_seconds)
        )
        shapes = [list(parameter.shape) for parameter in model.decoder.parameters()]
        self.kind = f'{type(self._decoding).__name__}, blank {self._decoding.decoding.blank_id}, decoder {shapes}'
        super().__init__(batch, device, lambda: _Stream(self._decoding.start))

    def take(self, encoded: Tensor, lengths: list[int], ended: Any, log_probs: Any = None) -> list[TextUpdate]:
        """Take new frames [B, D, A], ``lengths`` of each stream, and return what they add to the text of each.

        ``log_probs`` are those of the CTC decoder, [B, A, C], where it has run already.
        """
        tokens: list[Sequence[Token]] = [()] * len(lengths)
        if rows := [row for row, length in enumerate(lengths) if length]:
            some = slice(None) if len(rows) == len(lengths) else rows
            streams, counts = [self.streams[row] for row in rows], [lengths[row] for row in rows]
            memory, first = [stream.memory for stream in streams], [stream.received for stream in streams]
            log_probs = None if log_probs is None else log_probs[some]
            found, memory = self._decoding.decode(encoded[some], counts, memory, first, log_probs)
            for row, stream, new, remembered in zip(rows, streams, found, memory):
                tokens[row], stream.memory = new, remembered
        return [self._advance(*each) for each in zip(self.streams, tokens, lengths, ended)]

    def transcript(self, row: int) -> Transcript:
        """Return all text of a stream so far."""
        stream = self.streams[row]
        bounds = [*stream.words, stream.open, len(stream.tokens)]
        words = [self._spelling.word(stream, *pair) for pair in zip(bounds, bounds[1:])]
        return Transcript(self._spelling.text(stream.tokens), [word for word in words if word.text])

    def check(self, state: Any) -> None:
        """Raise ValueError unless :meth:`load` can take a state."""
        super().check(state)
        if not len(state['tokens']) == len(state['frames']) == len(state['confidences']) >= state['open']:
            raise ValueError("load: LiveText is damaged; tokens, frames and confidences differ in length")

    def _advance(self, stream: _Stream, tokens: Sequence[Token], frames: int, ended: bool) -> TextUpdate:
        update = TextUpdate([])
        for token in tokens:
            self._pass_silence(stream, token.frame, update)
            self._add(stream, token, update)
        stream.received += frames
        self._pass_silence(stream, stream.received, update)
        if ended:
            self._close_word(stream, update)
        elif tokens:
            stream.partial = self._spelling.word(stream, stream.open, len(stream.tokens))
        update.partial = stream.partial if stream.partial.text else None
        return update

    def _pass_silence(self, stream: _Stream, until: int, update: TextUpdate) -> None:
        """End the utterances that silence ends before frame ``until``."""
        while limit := self._after_speech if stream.spoken > stream.start else self._after_nothing:
            end = max(stream.spoken, stream.start) + limit
            if end > until:
                return
            self._close_word(stream, update, end)

    def _add(self, stream: _Stream, token: Token, update: TextUpdate) -> None:
        if token.repeats:  # NeMo aggregates the confidence of a token over its frames
            stream.repeated += 1
            before = stream.confidences[-1]
            if self._decoding.decoding.word_confidence_aggregation == 'mean':
                stream.confidences[-1] += (token.confidence - before) / stream.repeated
            else:
                stream.confidences[-1] = self._spelling.aggregate([before, token.confidence])
        else:
            grown = len(stream.tokens) - stream.open
            if grown and (grown >= LONGEST_WORD or self._spelling.begins_word(token.token)):
                too_long = self._longest is not None and token.frame - stream.start >= self._longest
                self._close_word(stream, update, token.frame if too_long else None)
            stream.tokens.append(token.token)
            stream.frames.append(token.frame)
            stream.confidences.append(token.confidence)
            stream.repeated = 1

    def _close_word(self, stream: _Stream, update: TextUpdate, utterance_end: int | None = None) -> None:
        """Make the partial word final, and end the utterance at a frame."""
        if len(stream.tokens) > stream.open:
            word = self._spelling.word(stream, stream.open, len(stream.tokens))
            update.final_words += [word] if word.text else []
            stream.words.append(stream.open)
            stream.open = len(stream.tokens)
        stream.partial = NO_WORD
        if utterance_end is not None:
            update.utterance_ends.append(utterance_end * self.frame_seconds)
            stream.start = utterance_end
