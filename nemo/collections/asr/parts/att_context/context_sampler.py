# SPDX-License-Identifier: Apache-2.0
"""Dynamic chunk training: each batch draws how large its chunks are, and how many of them it sees of the past.

One model then streams at any latency of the range, as those of WeNet (https://arxiv.org/abs/2012.05481), SpeechBrain and
icefall do. The full context among the draws keeps it good offline, too.
"""

import random
from dataclasses import asdict, dataclass

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, context_label
from nemo.collections.asr.parts.att_context.windows import STYLES

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
            field: the config key that an error names.

        Raises:
            ValueError: naming the key, its value and what is allowed.
        """
        from nemo.collections.asr.parts.utils import config_keys  # that package imports this one

        section = config_keys.ContextSampler.parse(value, field)
        chunk_size, left_chunks = tuple(section.chunk_size), section.left_chunks
        if style not in STYLES:
            raise ValueError(f"{field}: att_context_style is {style!r}; use chunked_limited")
        if style == 'regular' and chunk_size != (1, 1):
            raise ValueError(
                f"{field}.chunk_size is {list(chunk_size)}; with att_context_style regular it must be [1, 1], for that "
                "style has no chunks: a right context adds up from layer to layer. Use chunked_limited"
            )
        if (left_chunks is None) != (section.left_limited_prob == 0):
            raise ValueError(
                f"{field}.left_chunks is {left_chunks} and {field}.left_limited_prob is {section.left_limited_prob}; a "
                "left context that is limited in some batches needs both"
            )
        if left_chunks is not None and left_chunks[0] == 0 and chunk_size[0] == 1:
            raise ValueError(
                f"{field}.left_chunks is {left_chunks}; from 0 chunks on it needs {field}.chunk_size from 2 on: a chunk "
                "of one frame and no other shows a frame nothing but itself"
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

    def __str__(self) -> str:
        """What is drawn, in one line."""
        return f"att_context_sampler {asdict(self)}"


def _whole_number(share: float, low: int, high: int) -> int:
    """Return one of low ... high, all alike for a share that is uniform from 0 to 1."""
    return low + int(share * (high - low + 1))
