# SPDX-License-Identifier: Apache-2.0
"""The text of live streams: greedy tokens, the words that they make, and where utterances end.

Greedy decoding never takes a token back, so text only grows. A step costs the same at any length of the stream.

Shapes: B streams, D the encoder's width, A attention frames, C classes.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from nemo.collections.asr.parts.streaming.decoding import Token, greedy_decoding
from nemo.collections.asr.parts.streaming.state import StreamStates

WORD_START = '▁'  # SentencePiece's mark
CONTINUES = '##'  # the mark of word pieces


@dataclass(frozen=True)
class Word:
    """A word of a live stream."""

    text: str
    start: float
    """Seconds from the start of the stream to the word's first token."""
    end: float
    """Seconds to the end of the frame of its last token."""
    confidence: float | None = None
    """From 0 to 1, with ``TextOptions.confidence``."""


@dataclass
class TextUpdate:
    """What one step adds to the text of a stream."""

    final_words: list[Word]
    """Words that became final in this step."""
    partial: Word | None = None
    """The word that can still grow."""
    utterance_ends: list[float] = field(default_factory=list)
    """Seconds at which utterances ended, by the rules of ``TextOptions``."""

    @classmethod
    def concatenate(cls, updates: Sequence['TextUpdate']) -> 'TextUpdate':
        """Join the updates of consecutive steps."""
        words = [word for update in updates for word in update.final_words]
        return cls(words, updates[-1].partial, [end for update in updates for end in update.utterance_ends])


@dataclass
class Transcript:
    """All that a stream has contained so far."""

    text: str
    """As NeMo decodes all tokens at once."""
    words: list[Word]
    """The partial word is the last."""


@dataclass(frozen=True)
class TextOptions:
    """How text is made. The end of an utterance makes its last word final; it does not change ``Transcript.text``.

    Raises:
        ValueError: if a value is out of its range.
    """

    silence_after_nothing: float | None = 2.4
    """Seconds without a token that end an utterance that has none; None: never."""
    silence_after_speech: float | None = 1.2
    """Seconds without a token that end an utterance that has some; None: never."""
    utterance_seconds: float | None = 20.0
    """An utterance of this length ends with its present word; None: never."""
    confidence: bool = False
    """Whether words have a confidence, computed as NeMo's ``decoding.confidence_cfg`` is set."""
    longest_word: int = 64
    """Tokens after which a word is final, for languages without spaces."""

    def __post_init__(self) -> None:
        for name in ('silence_after_nothing', 'silence_after_speech', 'utterance_seconds'):
            value = getattr(self, name)
            if value is not None and not 0 < value < float('inf'):
                raise ValueError(f"TextOptions.{name} is {value!r}; it must be above 0 seconds, or None")
        if self.longest_word < 1:
            raise ValueError(f"TextOptions.longest_word is {self.longest_word!r}; it must be 1 token or more")


@dataclass
class _Stream:
    """Tokens of one stream, and where its words and utterances begin; positions are frames of the stream."""

    received: int = 0
    memory: object = None
    """Of the decoding."""
    tokens: array = field(default_factory=lambda: array('i'))
    frames: array = field(default_factory=lambda: array('q'))
    confidences: array = field(default_factory=lambda: array('d'))
    words: array = field(default_factory=lambda: array('q'))
    """Index of the first token of each final word."""
    open: int = 0
    """Index of the first token of the word that can still grow."""
    repeated: int = 1
    """Frames of the last token, of a CTC path."""
    start: int = 0
    """Where the utterance begins."""
    silent_from: int = 0
    """Where the silence behind its last token begins."""
    has_speech: bool = False
    partial: Word | None = None


class Spelling:
    """Reads tokens with NeMo's decoding class: characters, SentencePiece, or word pieces.

    Args:
        decoding: a model's ``decoding``, CTC or RNNT.
        frame_seconds: duration of an attention frame.
    """

    def __init__(self, decoding, frame_seconds: float):
        self.decoding, self.frame_seconds = decoding, frame_seconds
        tokenizer = getattr(decoding, 'tokenizer', None)
        self._pieces = tokenizer is not None
        self._marks_starts = any(str(piece).startswith(WORD_START) for piece in getattr(tokenizer, 'vocab', ()))
        self._piece = cache(lambda token: decoding.decode_ids_to_tokens([token])[0])
        self.aggregate = decoding.confidence_aggregation_bank[decoding.word_confidence_aggregation]

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self.decoding.decode_ids_to_str(list(tokens)) if tokens else ''

    def begins_word(self, token: int) -> bool:
        """Return whether a token begins a word; a space belongs to the word after it."""
        piece = self._piece(token)
        if not self._pieces:
            return piece == ' '
        return piece.startswith(WORD_START) if self._marks_starts else not piece.startswith(CONTINUES)

    def word(self, tokens: Sequence[int], frames: Sequence[int], confidences: Sequence[float]) -> Word | None:
        """Return the word of tokens, None if they are blank; confidences may be NaN."""
        first = 0
        while not self._pieces and first < len(tokens) and self._piece(tokens[first]) == ' ':
            first += 1
        text = self.text(tokens[first:]).strip()
        if not text:
            return None
        confidence = self.aggregate(confidences[first:])
        start, end = frames[first] * self.frame_seconds, (frames[-1] + 1) * self.frame_seconds
        return Word(text, start, end, None if confidence != confidence else confidence)


class LiveText(StreamStates):
    """Turns encoder frames into text as they come.

    Args:
        model: a CTC, RNNT or hybrid model; a hybrid model decodes as its ``cur_decoder`` is set.
        batch: B.
        frame_seconds: duration of an attention frame.
        options: how text is made.
        device: of the frames.

    Raises:
        ValueError: if the model is no recogniser, its decoding is not greedy, or it has no confidence.
    """

    name = 'text'

    def __init__(self, model, batch: int, frame_seconds: float, options: TextOptions, device: torch.device = 'cpu'):
        self.options, self.frame_seconds = options, frame_seconds
        self._decoding = greedy_decoding(model, options.confidence)
        self._spelling = Spelling(self._decoding.decoding, frame_seconds)
        self._after_nothing, self._after_speech, self._longest = (
            None if seconds is None else max(round(seconds / frame_seconds), 1)
            for seconds in (options.silence_after_nothing, options.silence_after_speech, options.utterance_seconds)
        )
        shapes = [list(parameter.shape) for parameter in model.decoder.parameters()]
        self.kind = f'{type(self._decoding).__name__}, blank {self._decoding.decoding.blank_id}, decoder {shapes}'
        super().__init__(batch, device)

    def new_stream(self) -> _Stream:
        """Return the state before the first frame."""
        return _Stream()

    def take(self, encoded: torch.Tensor, lengths: list[int], ended, log_probs=None) -> list[TextUpdate]:
        """Take new frames and return what they add to the text of each stream.

        Args:
            encoded: [B, D, A].
            lengths: number of new frames of each stream.
            ended: whether each stream has ended, [B].
            log_probs: [B, A, C] of the CTC decoder, where it has run already.
        """
        tokens: list = [()] * len(lengths)
        rows = [row for row, length in enumerate(lengths) if length]
        if rows:
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
        words = [self._word(stream, *pair) for pair in zip(bounds, bounds[1:])]
        return Transcript(self._spelling.text(stream.tokens), [word for word in words if word is not None])

    def restored(self, state: dict) -> _Stream:
        """Return the object of an exported state."""
        stream = super().restored(state)
        if not isinstance(stream.memory, (type(None), self._decoding.memory)):
            raise ValueError(f"load: text.memory is damaged; it must be {self._decoding.memory.__name__}")
        if not len(stream.tokens) == len(stream.frames) == len(stream.confidences) >= stream.open:
            raise ValueError("load: text is damaged; tokens, frames and confidences differ in length")
        return stream

    def _advance(self, stream: _Stream, tokens, frames: int, ended: bool) -> TextUpdate:
        """Take the tokens of a stream's new frames."""
        update = TextUpdate([])
        for token in tokens:
            self._pass_silence(stream, token.frame, update)
            self._add(stream, token, update)
        stream.received += frames
        self._pass_silence(stream, stream.received, update)
        if ended:
            self._close_word(stream, update)
        elif tokens:
            stream.partial = self._word(stream, stream.open, len(stream.tokens))
        update.partial = stream.partial
        return update

    def _pass_silence(self, stream: _Stream, until: int, update: TextUpdate) -> None:
        """End the utterances that silence ends before frame ``until``."""
        while True:
            limit = self._after_speech if stream.has_speech else self._after_nothing
            if limit is None or stream.silent_from + limit > until:
                return
            self._close_word(stream, update)
            self._end_utterance(stream, stream.silent_from + limit, update)

    def _add(self, stream: _Stream, token: Token, update: TextUpdate) -> None:
        if token.repeats:
            self._repeat(stream, token.confidence)
        else:
            grown = len(stream.tokens) - stream.open
            if grown and (grown >= self.options.longest_word or self._spelling.begins_word(token.token)):
                self._close_word(stream, update)
                if self._longest is not None and token.frame - stream.start >= self._longest:
                    self._end_utterance(stream, token.frame, update)
            stream.tokens.append(token.token)
            stream.frames.append(token.frame)
            stream.confidences.append(token.confidence)
            stream.repeated = 1
        stream.has_speech, stream.silent_from = True, token.frame + 1

    def _repeat(self, stream: _Stream, confidence: float) -> None:
        """Add a frame to the last token, whose confidence NeMo aggregates over its frames."""
        stream.repeated += 1
        before = stream.confidences[-1]
        if self._decoding.decoding.word_confidence_aggregation == 'mean':
            stream.confidences[-1] += (confidence - before) / stream.repeated
        else:
            stream.confidences[-1] = self._spelling.aggregate([before, confidence])

    def _close_word(self, stream: _Stream, update: TextUpdate) -> None:
        """Make the partial word final."""
        count = len(stream.tokens)
        if count > stream.open:
            word = self._word(stream, stream.open, count)
            update.final_words += [] if word is None else [word]
            stream.words.append(stream.open)
            stream.open = count
        stream.partial = None

    def _end_utterance(self, stream: _Stream, frame: int, update: TextUpdate) -> None:
        update.utterance_ends.append(frame * self.frame_seconds)
        stream.start, stream.silent_from, stream.has_speech = frame, frame, False

    def _word(self, stream: _Stream, first: int, end: int) -> Word | None:
        columns = stream.tokens, stream.frames, stream.confidences
        return self._spelling.word(*(column[first:end] for column in columns))
