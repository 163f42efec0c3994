# SPDX-License-Identifier: Apache-2.0
"""Which context a batch gets, as a pure function of seed, step and rank."""

from dataclasses import dataclass

from nemo.collections.asr.parts.att_context.context import AttContext, context_label, draw_index
from nemo.collections.asr.parts.att_context.context_sampler import ContextSampler, window_of_layer, within_ceiling
from nemo.collections.asr.parts.att_context.windows import Window

CEILING = 'encoder.att_context_ceiling'  # in errors


@dataclass(frozen=True)
class ContextPolicy:
    """The contexts of training batches: options with probabilities, or a sampler, and a ceiling on both."""

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

    def at(self, step: int, rank: int = 0) -> AttContext:
        """Return the context of a training step, within the ceiling; no global generator is touched.

        Args:
            step: the global step.
            rank: of the process; ignored if the draw is ``shared``.
        """
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

    def narrowed(self, context: AttContext) -> AttContext:
        """Return what the ceiling leaves of a context.

        Raises:
            ValueError: if the style has no context that shows what both show.
        """
        return context if self.ceiling is None else self._below(context, self.ceiling, CEILING)

    def check_ceiling(self, ceiling: AttContext, layers: tuple, where: str) -> None:
        """Check that a ceiling, and below it each layer's own context, narrows all that a batch can have.

        Args:
            ceiling: the ceiling.
            layers: the layers' own contexts, None for a layer without.
            where: what an error begins with.

        Raises:
            ValueError: if the style has no context that shows what both show.
        """
        for batch in self.contexts():
            narrowed = self._below(batch, ceiling, where)
            for own in set(layers) - {None} if self.sampler is not None else ():
                self.within(narrowed, own, f'{where}: a layer has {own.as_list()}, and')

    def within(self, batch: AttContext, own: AttContext, where: str) -> Window:
        """Return the window of a layer with a context of its own.

        Args:
            batch: the batch's context.
            own: the layer's; -1 narrows nothing on its side.
            where: what an error begins with.

        Raises:
            ValueError: if no window of the style shows what both show.
        """
        if self.sampler is None:
            return Window(batch, self.style).intersect(own, where)
        try:
            return window_of_layer(batch, own, self.style, where)
        except ValueError as error:
            raise ValueError(f"{error}; its chunks are those of {self.sampler}") from None

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

    def _below(self, context: AttContext, ceiling: AttContext, where: str) -> AttContext:
        if self.sampler is not None:
            return within_ceiling(context, ceiling, self.style)
        return Window(context, self.style).intersect(ceiling, where).context
