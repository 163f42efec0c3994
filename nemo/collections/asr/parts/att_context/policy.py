# SPDX-License-Identifier: Apache-2.0
"""Which context a batch gets, as a pure function of seed, step and rank."""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, context_label, draw_index
from nemo.collections.asr.parts.att_context.windows import Window

CEILING, SAMPLER = 'encoder.att_context_ceiling', 'model.encoder.att_context_sampler'  # as errors name them
FULL = AttContext(UNLIMITED, UNLIMITED)


@dataclass(frozen=True)
class ContextSampler:
    """Dynamic chunk training: each batch draws its chunk size, and how many chunks it sees of the past.

    One model then streams at any latency of the range, as those of WeNet (https://arxiv.org/abs/2012.05481), SpeechBrain
    and icefall do. Draws of the full context keep its offline quality.
    """

    full_prob: float  # probability of the full context, [-1, -1]
    chunk_size: tuple[int, int]  # the smallest and the largest, in attention frames; c are a right context of c - 1
    left_chunks: tuple[int, int] | None = (
        None  # the fewest and the most that a frame sees before its own, where limited
    )
    left_limited_prob: float = 0.0  # probability that the left context of a batch with chunks is limited

    @classmethod
    def parse(cls, value: Mapping[str, Any], style: str = 'chunked_limited') -> 'ContextSampler':
        """Read the section of a config, for an attention style, which has to have chunks.

        Raises:
            ValueError: naming the key, its value and what is allowed.
        """
        from nemo.collections.asr.parts.utils import config_keys  # that package imports this one

        section = config_keys.ContextSampler.parse(value)
        chunk_size, left_chunks = tuple(section.chunk_size), section.left_chunks
        if style != 'chunked_limited':
            raise ValueError(f"{SAMPLER}: att_context_style is {style!r}, which has no chunks; use chunked_limited")
        if (left_chunks is None) != (section.left_limited_prob == 0):
            raise ValueError(
                f"{SAMPLER}.left_chunks is {left_chunks} and {SAMPLER}.left_limited_prob is "
                f"{section.left_limited_prob}; a left context that is limited in some batches needs both"
            )
        if left_chunks is not None and left_chunks[0] == 0 and chunk_size[0] == 1:
            raise ValueError(
                f"{SAMPLER}.left_chunks is {left_chunks}; from 0 chunks on it needs {SAMPLER}.chunk_size from 2 on: a "
                "chunk of one frame and no other shows a frame nothing but itself"
            )
        return cls(section.full_prob, chunk_size, left_chunks and tuple(left_chunks), section.left_limited_prob)

    def draw(self, seed: int, step: int | str) -> AttContext:
        """Draw the context of a training step, as a pure function of (seed, step); see ``context.draw_index``."""
        generator = random.Random(f'{seed}:{step}')  # a text seed is hashed alike on every platform and Python
        full, size, limited, left = (generator.random() for _ in range(4))
        if full < self.full_prob:
            return FULL
        chunk = _whole_number(size, *self.chunk_size)
        if limited >= self.left_limited_prob:
            return AttContext(UNLIMITED, chunk - 1)
        return AttContext(_whole_number(left, *(self.left_chunks or (0, 0))) * chunk, chunk - 1)

    def covers(self, context: AttContext) -> bool:
        """Return whether this context can be drawn."""
        if context == FULL:
            return self.full_prob > 0
        smallest, largest = self.chunk_size
        if self.full_prob == 1 or not smallest <= context.right + 1 <= largest:
            return False
        if context.left == UNLIMITED or self.left_chunks is None:
            return context.left == UNLIMITED and self.left_limited_prob < 1
        chunks, rest = divmod(context.left, context.right + 1)
        return rest == 0 and self.left_chunks[0] <= chunks <= self.left_chunks[1]

    def widest_contexts(self) -> list[AttContext]:
        """Return the drawable context with the largest left side for each chunk size, and the full one."""
        most = self.left_chunks[1] if self.left_chunks and self.left_limited_prob == 1 else UNLIMITED
        chunks = range(self.chunk_size[0], self.chunk_size[1] + 1) if self.full_prob < 1 else ()
        limited = [AttContext(max(most * chunk, UNLIMITED), chunk - 1) for chunk in chunks]
        return [FULL, *limited] if self.full_prob > 0 else limited

    def __str__(self) -> str:
        return f"att_context_sampler {asdict(self)}"


def _whole_number(share: float, low: int, high: int) -> int:
    """Return one of low ... high, all alike for a share that is uniform from 0 to 1."""
    return low + int(share * (high - low + 1))


@dataclass(frozen=True)
class ContextPolicy:
    """The contexts of training batches: options with probabilities, or a sampler, and a ceiling on both.

    What narrows a context raises ValueError, beginning with ``where``, if the style cannot show what both show.
    """

    default: AttContext  # of validation and inference
    options: tuple[AttContext, ...] = ()  # the contexts to draw from; with fewer than two, the default is taken
    probabilities: tuple[float, ...] = ()  # one for each option; they sum to 1
    sampler: ContextSampler | None = None  # draws the contexts instead of the options
    seed: int = 0
    shared: bool = True  # whether all ranks draw the same context in a step
    ceiling: AttContext | None = None  # narrows every context of training; a curriculum replaces it
    style: str = 'regular'  # of the attention

    @property
    def draws(self) -> bool:
        """Whether batches differ in their contexts."""
        return self.sampler is not None or len(self.options) > 1

    @property
    def left_multiple(self) -> int:
        """What interpolated left contexts must be a multiple of: the chunk of each possible context."""
        if self.style != 'chunked_limited' or self.sampler is not None:  # a sampler's are rounded in each batch
            return 1
        return math.lcm(*(context.right + 1 for context in self.contexts() if context.right != UNLIMITED))

    def at(self, step: int, rank: int = 0) -> AttContext:
        """Return the context of a global step, within the ceiling; a ``shared`` draw ignores the rank."""
        number = step if self.shared else f'{step}:{rank}'
        if self.sampler is not None:
            context = self.sampler.draw(self.seed, number)
        elif self.draws:
            context = self.options[draw_index(self.seed, number, self.probabilities)]
        else:
            context = self.default
        return self.narrowed(context)

    def contexts(self) -> list[AttContext]:
        """Return every context that a batch can have, once; a sampler's widest for each chunk size."""
        drawn = [] if self.sampler is None else self.sampler.widest_contexts()
        return list(dict.fromkeys([*self.options, self.default, *drawn]))

    def covers(self, context: AttContext) -> bool:
        """Return whether a training batch can have this context."""
        return context in self.options or (self.sampler is not None and self.sampler.covers(context))

    def narrowed(self, context: AttContext, limit: AttContext | None = None, where: str = CEILING) -> AttContext:
        """Return a context within a limit; by default the ceiling, and then, or with a sampler, in whole chunks."""
        rounds, limit = self.sampler is not None or limit is None, self.ceiling if limit is None else limit
        if limit is None:
            return context
        if rounds:
            return Window(context.intersect(limit), self.style).in_whole_chunks().context
        return Window(context, self.style).intersect(limit, where).context

    def within(self, batch: AttContext, own: AttContext, where: str) -> AttContext:
        """Return what a layer with a context of its own attends to in a batch; a sampler's chunks are not cut."""
        if self.sampler is not None:
            Window(batch, self.style).intersect(AttContext(UNLIMITED, own.right), f'{where}, with {self.sampler}')
        return self.narrowed(batch, own, where)

    def check_layer(self, own: AttContext, where: str) -> None:
        """Check that a layer can have this context in every batch, with a right side that some batch has."""
        batches = self.contexts()
        rights = [batch.right for batch in batches]
        if UNLIMITED not in rights and own.right > max(rights):
            raise ValueError(
                f"{where}: the right context is {own.right}, beyond the batch's; it must be at most {max(rights)}, "
                f"that of att_context_size {[batch.as_list() for batch in batches]}, or -1 for it"
            )
        for batch in batches:
            self.within(batch, own, where)

    def label(self, context: AttContext) -> str:
        """Return the name of a batch's context in metrics; a sampler's chunks share a few: ``chunk_8_to_15``."""
        if self.sampler is None or context in self.options or context.right == UNLIMITED:
            return context_label(context)
        first = 1 << ((context.right + 1).bit_length() - 1)
        return f'chunk_{first}_to_{2 * first - 1}' if first > 1 else 'chunk_1'

    def __str__(self) -> str:
        """What training draws from, in one line."""
        if self.sampler is not None:
            return f'those of {self.sampler}'
        return ', '.join(str(list(context)) for context in self.options or (self.default,))
