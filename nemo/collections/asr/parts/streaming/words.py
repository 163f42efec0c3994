# SPDX-License-Identifier: Apache-2.0
"""Words of tokens: which token begins a word, and when it was spoken.

NeMo's decoding class reads the tokens: characters, SentencePiece, or word pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

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


class Spelling:
    """Reads tokens with NeMo's decoding class.

    Args:
        decoding: a model's ``decoding`` (CTC or RNNT; characters or BPE).
        frame_seconds: duration of an attention frame.
    """

    def __init__(self, decoding, frame_seconds: float):
        self.decoding, self.frame_seconds = decoding, frame_seconds
        tokenizer = getattr(decoding, 'tokenizer', None)
        vocabulary = [] if tokenizer is None else list(map(str, getattr(tokenizer, 'vocab', ())))
        self._pieces = tokenizer is not None
        self._marks_starts = any(piece.startswith(WORD_START) for piece in vocabulary)
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
