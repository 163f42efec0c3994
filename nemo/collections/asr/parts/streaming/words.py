# SPDX-License-Identifier: Apache-2.0
"""Words of tokens: which token begins one, and when each was heard.

What the tokens are is asked of NeMo's decoding class: characters, pieces of SentencePiece, or word pieces.
"""

from dataclasses import dataclass

WORD_START = '▁'  # SentencePiece's mark
CONTINUES = '##'  # the mark of word pieces


@dataclass(frozen=True)
class Word:
    """A word of a live stream."""

    text: str
    start: float
    """Seconds from the beginning of the stream to its first token's frame."""
    end: float
    """To the end of its last token's frame."""


@dataclass
class Token:
    """A token that was decided on, and its attention frame."""

    token: int
    frame: int


class Spelling:
    """Reads tokens by NeMo's decoding class.

    Args:
        decoding: a model's ``decoding`` (CTC or RNNT; characters or BPE).
        frame_seconds: of an attention frame.
    """

    def __init__(self, decoding, frame_seconds: float):
        self.decoding, self.frame_seconds = decoding, frame_seconds
        tokenizer = getattr(decoding, 'tokenizer', None)
        vocabulary = [] if tokenizer is None else list(map(str, getattr(tokenizer, 'vocab', ())))
        self._pieces = tokenizer is not None
        self._marks_starts = any(piece.startswith(WORD_START) for piece in vocabulary)

    def text(self, tokens: list[Token]) -> str:
        """Return the text of tokens."""
        return self.decoding.decode_ids_to_str([each.token for each in tokens]) if tokens else ''

    def words(self, tokens: list[Token]) -> list[Word]:
        """Return the words of tokens; the last may still grow."""
        groups: list[list[Token]] = []
        for each in tokens:
            (piece,) = self.decoding.decode_ids_to_tokens([each.token])
            separates = not self._pieces and piece == ' '
            if not groups or separates or (self._pieces and self._begins_word(piece)):
                groups.append([])
            if not separates:
                groups[-1].append(each)
        return [self._word(group) for group in groups if group and self.text(group).strip()]

    def _begins_word(self, piece: str) -> bool:
        return piece.startswith(WORD_START) if self._marks_starts else not piece.startswith(CONTINUES)

    def _word(self, group: list[Token]) -> Word:
        start, end = group[0].frame, group[-1].frame + 1
        return Word(self.text(group).strip(), start * self.frame_seconds, end * self.frame_seconds)
