# SPDX-License-Identifier: Apache-2.0
"""Dynamic chunk training: each batch draws how large its chunks are, and how many of them it sees of the past.

One model then streams at any latency of the range, as those of WeNet (https://arxiv.org/abs/2012.05481), SpeechBrain and
icefall do. The full context among the draws keeps it good offline, too.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, context_label
from nemo.collections.asr.parts.att_context.windows import STYLES, Window

FIELD = 'model.encoder.att_context_sampler'  # as errors name it
FULL = AttContext(UNLIMITED, UNLIMITED)


@dataclass(frozen=True)
class ContextSampler:
    """Where the context of a training batch is drawn from; read from a config by :meth:`parse`."""

    full_prob: float
    """Probability from 0 to 1 that a batch has the full context, [-1, -1]: each frame sees the whole utterance."""
    chunk_size: tuple[int, int]
    """The smallest and the largest chunk, in attention frames. A chunk of c frames is a right context of c - 1."""
    left_chunks: tuple[int, int] | None = None
    """The fewest and the most chunks before its own that a frame sees, where the left context is limited, in chunks."""
    left_limited_prob: float = 0.0
    """Probability from 0 to 1 that the left context of a batch with chunks is limited."""

    @classmethod
    def parse(cls, value, style: str = 'chunked_limited', field: str = FIELD) -> 'ContextSampler':
        """Read the section of a config.

        Args:
            value: a mapping of the fields' names; ``left_chunks`` and ``left_limited_prob`` come both or not at all.
            style: the encoder's attention style. ``regular`` has no chunks: it takes chunks of one frame only.
            field: the config key to name in an error.

        Raises:
            ValueError: naming the key, its value and what is allowed.
        """
        from nemo.collections.asr.parts.utils.config_keys import check_known  # that package imports this one

        if isinstance(value, cls):
            value = value.as_dict()
        section = value if isinstance(value, Mapping) else {}
        check_known(field, section, [key.name for key in fields(cls)])
        if not {'full_prob', 'chunk_size'} <= section.keys():
            shown = dict(section) or value
            raise ValueError(f"{field} is {shown!r}; it must have full_prob and chunk_size")
        chunk_size = _range(value['chunk_size'], f'{field}.chunk_size', 1, 'attention frames')
        _check_style(chunk_size, style, field)
        sampler = cls(_probability(value['full_prob'], f'{field}.full_prob'), chunk_size, *_left(value, field))
        if sampler.left_chunks and sampler.left_chunks[0] == 0 and chunk_size[0] == 1:
            raise ValueError(
                f"{field}.left_chunks is {list(sampler.left_chunks)}; from 0 chunks on it needs "
                f"{field}.chunk_size from 2 on: a chunk of one frame and no other shows a frame nothing but itself"
            )
        return sampler

    def draw(self, seed: int, step: int) -> AttContext:
        """Draw the context of a training step, as a pure function of (seed, step).

        Every rank, and a resumed run, draws the same without exchanging anything; no global generator is touched.
        """
        generator = random.Random(f'{seed}:{step}')  # a text seed is hashed alike on every platform and Python
        full, size, limited, left = (generator.random() for _ in range(4))
        if full < self.full_prob:
            return FULL
        chunk = _whole_number(size, *self.chunk_size)
        if limited >= self.left_limited_prob:
            return AttContext(UNLIMITED, chunk - 1)
        return AttContext(_whole_number(left, *self.left_chunks) * chunk, chunk - 1)

    def covers(self, context: AttContext) -> bool:
        """Return whether this context can be drawn."""
        if context == FULL:
            return self.full_prob > 0
        chunk, (fewest, most) = context.right + 1, self.chunk_size
        if self.full_prob == 1 or not fewest <= chunk <= most:
            return False
        if context.left == UNLIMITED:
            return self.left_limited_prob < 1
        chunks, rest = divmod(context.left, chunk)
        return self.left_limited_prob > 0 and rest == 0 and self.left_chunks[0] <= chunks <= self.left_chunks[1]

    def widest_contexts(self) -> list[AttContext]:
        """Return, for each size of a chunk, the context that can be drawn with the largest left side; and the full one.

        What an encoder can follow in all of these it can follow in every context that is drawn.
        """
        left_is_limited, contexts = self.left_limited_prob == 1, [FULL] if self.full_prob > 0 else []
        for chunk in range(self.chunk_size[0], self.chunk_size[1] + 1) if self.full_prob < 1 else ():
            contexts.append(AttContext(self.left_chunks[1] * chunk if left_is_limited else UNLIMITED, chunk - 1))
        return contexts

    def group_label(self, context: AttContext) -> str:
        """Return the name, in metrics, of a few contexts alike: ``chunk_8_to_15``; by powers of two, few in all."""
        if context.right == UNLIMITED:
            return context_label(context)
        first = 1 << ((context.right + 1).bit_length() - 1)
        return f'chunk_{first}_to_{2 * first - 1}' if first > 1 else 'chunk_1'

    def as_dict(self) -> dict:
        """Return the section as a config holds it, without what is not given."""
        section = {'full_prob': self.full_prob, 'chunk_size': list(self.chunk_size)}
        if self.left_chunks is not None:
            section.update(left_chunks=list(self.left_chunks), left_limited_prob=self.left_limited_prob)
        return section

    def __str__(self) -> str:
        """What is drawn, in one line."""
        return f"att_context_sampler {self.as_dict()}"


def within_ceiling(context: AttContext, ceiling: AttContext, style: str) -> AttContext:
    """Narrow a context to a ceiling by cutting its chunk, and rounding its left side down to whole chunks.

    A chunk of more frames than the ceiling's right context + 1 becomes one of as many. Unlike an intersection that
    always succeeds, so any ceiling can narrow what is drawn.
    """
    return in_whole_chunks(context.intersect(ceiling), style)


def in_whole_chunks(context: AttContext, style: str) -> AttContext:
    """Round the left side of a context down to whole chunks."""
    if context.left == UNLIMITED:
        return context
    chunk = Window(context, style).chunk
    return AttContext(context.left // chunk * chunk, context.right)


def window_of_layer(batch: AttContext, own: AttContext, style: str, where: str) -> Window:
    """Return what a layer sees, in a batch's context, whose own left side is rounded down to whole chunks.

    The layer's chunks are the batch's or, where its own right side makes smaller ones, those.

    Args:
        batch: the batch's context.
        own: the layer's; -1 narrows nothing on its side.
        style: the attention style.
        where: what to name in an error: where ``own`` was found.

    Raises:
        ValueError: if smaller chunks do not lie within the batch's.
    """
    Window(batch, style).intersect(AttContext(UNLIMITED, own.right), where)
    return Window(in_whole_chunks(batch.intersect(own), style), style)


def _left(value: Mapping, field: str) -> tuple[tuple[int, int] | None, float]:
    """Read what limits the left context: chunks, and a probability."""
    chunks, probability = value.get('left_chunks'), value.get('left_limited_prob')
    if chunks is None and not probability:
        return None, 0.0 if probability is None else _probability(probability, f'{field}.left_limited_prob')
    if chunks is None or probability is None:
        raise ValueError(
            f"{field}.left_chunks is {chunks!r} and {field}.left_limited_prob is {probability!r}; a left context that "
            "is limited in some batches needs both"
        )
    chunks = _range(chunks, f'{field}.left_chunks', 0, 'chunks')
    return chunks, _probability(probability, f'{field}.left_limited_prob')


def _check_style(chunk_size: tuple[int, int], style: str, field: str) -> None:
    if style not in STYLES:
        raise ValueError(f"{field}: att_context_style is {style!r}; use chunked_limited")
    if style == 'regular' and chunk_size != (1, 1):
        raise ValueError(
            f"{field}.chunk_size is {list(chunk_size)}; with att_context_style regular it must be [1, 1], for that "
            "style has no chunks: a right context adds up from layer to layer. Use chunked_limited"
        )


def _range(value, field: str, lowest: int, unit: str) -> tuple[int, int]:
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) for side in pair)
    if len(pair) != 2 or not whole or not lowest <= pair[0] <= pair[1]:
        shown = pair or value
        raise ValueError(f"{field} is {shown!r}; it must be [low, high] in {unit}, whole numbers of {lowest} or more")
    return int(pair[0]), int(pair[1])


def _probability(value, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{field} is {value!r}; it must be a probability, from 0 to 1")
    return float(value)


def _whole_number(share: float, low: int, high: int) -> int:
    """Return one of low ... high, all alike for a share that is uniform from 0 to 1."""
    return low + int(share * (high - low + 1))
