# SPDX-License-Identifier: Apache-2.0
"""Which context a batch gets, as a pure function of seed, step and rank."""

import math
from dataclasses import dataclass

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, context_label, draw_index
from nemo.collections.asr.parts.att_context.context_sampler import ContextSampler
from nemo.collections.asr.parts.att_context.windows import Window

CEILING = 'encoder.att_context_ceiling'  # in errors


@dataclass(frozen=True)
class ContextPolicy:
    """The contexts of training batches: options with probabilities, or a sampler, and a ceiling on both.

    What narrows a context raises ValueError, beginning with ``where``, if the style cannot show what both show.
    """

    default: AttContext
    """The context of validation and inference."""
    options: tuple[AttContext, ...] = ()
    """The contexts to draw from; with fewer than two, ``default`` is taken."""
    probabilities: tuple[float, ...] = ()
    """One for each option; they sum to 1."""
    sampler: ContextSampler | None = None
    """Draws the contexts instead of ``options``."""
    seed: int = 0
    shared: bool = True
    """Whether all ranks draw the same context in a step."""
    ceiling: AttContext | None = None
    """Narrows every context of training; a curriculum replaces it."""
    style: str = 'regular'
    """The attention style."""

    @property
    def draws(self) -> bool:
        """Whether batches differ in their contexts."""
        return self.sampler is not None or len(self.options) > 1

    @property
    def left_multiple(self) -> int:
        """What interpolated left contexts must be a multiple of: the chunk of every context that a batch can have."""
        if self.style != 'chunked_limited' or self.sampler is not None:  # a sampler's are rounded in each batch
            return 1
        return math.lcm(*(context.right + 1 for context in self.contexts() if context.right != UNLIMITED))

    def at(self, step: int, rank: int = 0) -> AttContext:
        """Return the context of a global step, within the ceiling; the rank is ignored if the draw is ``shared``."""
        number = step if self.shared else f'{step}:{rank}'
        if self.sampler is not None:
            context = self.sampler.draw(self.seed, number)
        elif self.draws:
            context = self.options[draw_index(self.seed, number, self.probabilities)]
        else:
            context = self.default
        return self.narrowed(context)

    def contexts(self) -> list[AttContext]:
        """Return every context that a batch can have, each once; of a sampler's, the widest for each chunk size.

        What an encoder can follow in the widest it can follow in all.
        """
        drawn = [] if self.sampler is None else self.sampler.widest_contexts()
        return list(dict.fromkeys([*self.options, self.default, *drawn]))

    def covers(self, context: AttContext) -> bool:
        """Return whether a training batch can have this context."""
        return context in self.options or (self.sampler is not None and self.sampler.covers(context))

    def narrowed(self, context: AttContext, ceiling: AttContext | None = None, where: str = CEILING) -> AttContext:
        """Return what a ceiling leaves of a context: by default the policy's own.

        A sampler's chunks are cut to the ceiling and its left side is rounded down to whole chunks, so that any ceiling
        can narrow them.
        """
        ceiling = self.ceiling if ceiling is None else ceiling
        if ceiling is None:
            return context
        if self.sampler is not None:
            return Window(context.intersect(ceiling), self.style).in_whole_chunks().context
        return Window(context, self.style).intersect(ceiling, where).context

    def within(self, batch: AttContext, own: AttContext, where: str) -> Window:
        """Return the window of a layer with a context of its own, of which -1 narrows nothing on its side.

        Its chunks are the batch's or, where its own right side makes smaller ones, those. In a sampler's batch its left
        side is rounded down to whole chunks.
        """
        window = Window(batch, self.style)
        if self.sampler is None:
            return window.intersect(own, where)
        try:
            window.intersect(AttContext(UNLIMITED, own.right), where)
        except ValueError as error:
            raise ValueError(f"{error}; its chunks are those of {self.sampler}") from None
        return Window(batch.intersect(own), self.style).in_whole_chunks()

    def check_layer(self, own: AttContext, where: str) -> None:
        """Check that a layer can have this context in every batch, and its right side is not beyond every batch's."""
        batches = self.contexts()
        rights = [batch.right for batch in batches]
        if UNLIMITED not in rights and own.right > max(rights):
            raise ValueError(
                f"{where}: the right context is {own.right}, beyond the batch's; it must be at most {max(rights)}, "
                f"that of att_context_size {[batch.as_list() for batch in batches]}, or -1 for it"
            )
        for batch in batches:
            self.within(batch, own, where)

    def check_ceiling(self, ceiling: AttContext, layers: tuple[AttContext | None, ...], where: str) -> None:
        """Check that a ceiling, and a layer below it, can narrow every batch."""
        for batch in self.contexts():
            narrowed = self.narrowed(batch, ceiling, where)
            for own in {own for own in layers if own is not None} if self.sampler is not None else ():
                self.within(narrowed, own, f'{where}: a layer has {own.as_list()}, and')

    def label(self, context: AttContext) -> str:
        """Return the name of a batch's context in metrics; a sampler's many contexts share a few names."""
        if self.sampler is None or context in self.options:
            return context_label(context)
        return self.sampler.group_label(context)

    def __str__(self) -> str:
        """What training draws from, in one line."""
        if self.sampler is not None:
            return f'those of {self.sampler}'
        return ', '.join(str(list(context)) for context in self.options or (self.default,))
