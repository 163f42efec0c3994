# SPDX-License-Identifier: Apache-2.0
"""The context of a batch, for an encoder: configured, set by hand, drawn, pinned for a whole step, and asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import ListConfig

from nemo.collections.asr.parts.att_context.context import AttContext, context_label, draw_index
from nemo.collections.asr.parts.att_context.context_sampler import ContextSampler, window_of_layer, within_ceiling
from nemo.collections.asr.parts.att_context.precedence import CEILING, context_of_batch
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.utils import logging


class BatchContext:
    """Mixin for an encoder with NeMo's ``att_context_size_all``, ``att_context_probs`` and ``att_context_style``.

    NeMo's methods that assign ``att_context_size`` must run within :meth:`_assigning_default`; what is assigned
    elsewhere, once the constructor has called :meth:`_end_of_construction`, is set by hand.
    """

    att_context_seed = 0
    att_context_sampler: ContextSampler | None = None
    """What the contexts of training are drawn from, in place of the configured ones."""
    _att_context_is_pinned = False  # within using_att_context_size
    _assigns_default = True  # whether who assigns att_context_size is NeMo, not a person
    _pinned_over: list | None = None  # the default, within using_att_context_size
    _by_hand: AttContext | None = None
    _by_hand_instead_of: list | None = None  # the default while a context is set by hand
    _told_by_hand: frozenset = frozenset()  # the contexts whose setting by hand has been logged
    _draws = 0  # steps counted by the encoder itself, where nobody passes one
    _att_context_ceiling: AttContext | None = None

    def draw_att_context_size(self, step: int | None = None) -> AttContext:
        """Return the context for a batch, without setting it; see :meth:`att_context_of_batch`.

        Args:
            step: the training step; the draw is a pure function of ``att_context_seed`` and it. None takes the
                encoder's own count of such draws, which starts at 0 in each process.
        """
        return self.att_context_of_batch(step=step)

    def att_context_of_batch(self, with_batch=None, step: int | None = None) -> AttContext:
        """Return the context that a batch has, without setting it; ``precedence.context_of_batch`` says who wins.

        In training ``att_context_sampler`` draws it or, without one, it is drawn from several ``att_context_size_all``
        by ``att_context_probs``; otherwise it is the default, ``att_context_size``. In training ``att_context_ceiling``
        narrows it; validation and inference keep the default, so that a curriculum does not change what they measure.

        Args:
            with_batch: the context that came with the batch, if one did.
            step: the training step that is drawn for, see :meth:`draw_att_context_size`.
        """
        draws = self.training and (self.att_context_sampler is not None or len(self.att_context_size_all) > 1)
        return context_of_batch(
            default=self.parse_att_context_size(self.att_context_size),
            by_hand=self.att_context_by_hand,
            with_batch=None if with_batch is None else self.parse_att_context_size(with_batch),
            draw=(lambda: self.parse_att_context_size(self._drawn_att_context_size(step))) if draws else None,
            ceiling=self.att_context_ceiling if self.training else None,
            style=self.att_context_style,
            cuts_chunks=self.att_context_sampler is not None,
        )

    def label_of_drawn(self, context) -> str:
        """Return the name of a training batch's context in metrics; of the many that a sampler draws, that of a group."""
        if self.att_context_sampler is None or list(context) in self._known_contexts():
            return context_label(context)
        return self.att_context_sampler.group_label(context)

    @torch.compiler.disable  # it would be compiled anew for each step
    def _drawn_att_context_size(self, step: int | None) -> list[int]:
        if step is None:
            step, self._draws = self._draws, self._draws + 1
        if self.att_context_sampler is not None:
            return self.att_context_sampler.draw(self.att_context_seed, step).as_list()
        return list(self.att_context_size_all[draw_index(self.att_context_seed, step, self.att_context_probs)])

    @property
    def att_context_ceiling(self) -> AttContext | None:
        """What narrows every context drawn in training; None: nothing. A curriculum sets it.

        Raises:
            ValueError: when set to what is no context, or one that the encoder's attention cannot follow.
        """
        return self._att_context_ceiling

    @att_context_ceiling.setter
    def att_context_ceiling(self, value) -> None:
        if value is not None:
            value = AttContext.parse(value, field=CEILING)
            if value != self._att_context_ceiling:
                self.check_att_context_ceiling(value, f'{CEILING} is {value.as_list()}')
        self._att_context_ceiling = value

    def check_att_context_ceiling(self, ceiling: AttContext, where: str) -> None:
        """Raise ValueError, beginning with ``where``, if the encoder's attention cannot follow this ceiling."""
        self._check_can_narrow(where)
        if self.att_context_sampler is None:
            for batch in self._batch_contexts():
                Window(batch, self.att_context_style).intersect(ceiling, where)
            return
        for batch in self._batch_contexts():  # cut to the ceiling they are all followed, unless by a layer
            narrowed = within_ceiling(batch, ceiling, self.att_context_style)
            for own in set(self.layer_att_contexts()) - {None}:
                self._window_within(narrowed, own, f'{where}: a layer has {own.as_list()}, and')

    def parse_att_context_size(self, att_context_size, field: str = 'encoder.att_context_size'):
        """Read a context as ``AttContext.parse`` does; the three numbers of ``chunked_limited_with_rc`` stay a list.

        Args:
            att_context_size: what people write for a context.
            field: what to name in an error.

        Raises:
            ValueError: if it is no context.
        """
        if self.att_context_style == 'chunked_limited_with_rc' and not isinstance(att_context_size, AttContext):
            return list(att_context_size)  # NeMo 3.0 reads it
        return AttContext.parse(att_context_size, field=field)

    def check_att_context_size(self, att_context_size) -> None:
        """Raise ValueError if the encoder's attention, or a layer's, cannot follow this context of a batch."""
        with self.using_att_context_size(att_context_size):
            self.effective_att_contexts()

    @contextmanager
    def using_att_context_size(self, att_context_size) -> Iterator[AttContext]:
        """Pin the context: inside, ``att_context_size`` is this one and every forward uses exactly it.

        Args:
            att_context_size: an ``AttContext`` or anything that ``AttContext.parse`` reads.

        Raises:
            ValueError: if it is no context, or the encoder's attention cannot follow it.
        """
        context = self.parse_att_context_size(att_context_size)
        self._check_can_attend_within(context)
        default, was_pinned, by_hand = self.att_context_size, self._att_context_is_pinned, self._by_hand
        self._pinned_over = self._pinned_over if was_pinned else default
        self._store(list(context))
        self._att_context_is_pinned = True
        try:
            yield context
        finally:
            self._att_context_is_pinned = was_pinned
            if self._by_hand is by_hand:  # else what somebody has set meanwhile stays
                self._store(default)

    @contextmanager
    def using_one_att_context_size(self) -> Iterator[AttContext]:
        """Keep the pinned context, or draw one (counting the step) and pin it: one context for all that is inside."""
        if self._att_context_is_pinned:
            yield self.parse_att_context_size(self.att_context_size)
            return
        with self.using_att_context_size(self.draw_att_context_size()) as context:
            yield context

    @property
    def att_context_size(self) -> list[int]:
        """The present context ``[left, right]`` in attention frames, NeMo's attribute: pinned, set by hand, or default.

        To set it is to call :meth:`set_att_context_size`.
        """
        return self.__dict__['att_context_size']

    @att_context_size.setter
    def att_context_size(self, att_context_size) -> None:
        if self._assigns_default:  # NeMo's own methods do
            self._store(att_context_size)
            if self._by_hand is not None:  # what is set last holds
                self._by_hand = self.parse_att_context_size(att_context_size)
        else:
            self.set_att_context_size(att_context_size)

    def _store(self, att_context_size) -> None:
        self.__dict__['att_context_size'] = att_context_size  # where NeMo's class has it

    @property
    def att_context_by_hand(self) -> AttContext | None:
        """The context that :meth:`set_att_context_size` has set; None: those of the config hold."""
        return self._by_hand

    @property
    def att_context_is_pinned(self) -> bool:
        """Whether every forward uses ``att_context_size``, in training, too, and nothing is drawn."""
        return self._att_context_is_pinned or self._by_hand is not None

    def set_att_context_size(self, att_context_size) -> None:
        """Attend within this context until told otherwise; ``encoder.att_context_size = [40, 0]`` does the same.

        It becomes the default, which the streaming parameters follow, and it holds in training: nothing is drawn, a
        synced batch's context is passed over; only a curriculum's ceiling still narrows it. Configs and checkpoints do
        not know of it.

        Args:
            att_context_size: anything that ``AttContext.parse`` reads; or None, or the list of all configured
                contexts: back to those, in training drawn for each batch where there are several.

        Raises:
            ValueError: if it is no context, or the encoder cannot follow it.
        """
        if att_context_size is None or self._are_the_configured(att_context_size):
            self.restore_att_context_state((self._by_hand_instead_of or self.att_context_size, None))
            return
        context = self.parse_att_context_size(att_context_size)
        self.check_att_context_size(context)
        self._tell_once(list(context))
        self.restore_att_context_state((list(context), context))

    def _tell_once(self, context: list) -> None:
        """Log a context that is set by hand; a hook may set the same ones in each step."""
        if tuple(context) in self._told_by_hand:
            return
        self._told_by_hand |= {tuple(context)}
        sampler, known = self.att_context_sampler, self._known_contexts()
        if context in known or (sampler is not None and sampler.covers(AttContext(*context))):
            logging.info(f"The attention context is {context} from now on, set by hand")
            return
        logging.warning(
            f"The attention context is set to {context}, which the model was not trained on; it was on "
            + (', '.join(map(str, known)) if sampler is None else f'those of {sampler}')
        )

    def att_context_state(self) -> tuple[list, AttContext | None]:
        """Return what :meth:`set_att_context_size` changes: the default, and the context set by hand."""
        return list(self.att_context_size), self._by_hand

    def restore_att_context_state(self, state: tuple[list, AttContext | None]) -> None:
        """Go back to what :meth:`att_context_state` returned."""
        default, by_hand = state
        if by_hand is None:
            self._by_hand_instead_of = None
        elif self._by_hand is None:
            self._by_hand_instead_of = self._pinned_over if self._att_context_is_pinned else self.att_context_size
        self._by_hand = by_hand
        self._store(default)
        self._follow_default()

    def _known_contexts(self) -> list[list[int]]:
        return [list(known) for known in self.att_context_size_all]

    def _are_the_configured(self, contexts) -> bool:
        is_list = isinstance(contexts, (list, tuple, ListConfig))
        several = is_list and all(isinstance(item, (list, tuple, ListConfig)) for item in contexts)
        return several and [list(item) for item in contexts] == self._known_contexts()

    def _batch_contexts(self) -> list[AttContext]:
        """Every context that a batch can have by the configuration, each once."""
        contexts = [*self.att_context_size_all, self.att_context_size]
        if self.att_context_sampler is not None:
            contexts += self.att_context_sampler.widest_contexts()
        return list(dict.fromkeys(self.parse_att_context_size(context) for context in contexts))

    def _window_within(self, batch: AttContext, own: AttContext, where: str) -> Window:
        """Return what a layer with this context of its own sees in a batch's; ``where`` begins an error's message."""
        style, sampler = self.att_context_style, self.att_context_sampler
        if sampler is None:
            return Window(batch, style).intersect(own, where)
        try:
            return window_of_layer(batch, own, style, where)
        except ValueError as error:
            raise ValueError(f"{error}; its chunks are those of {sampler}") from None

    def _end_of_construction(self) -> None:
        """Say that from now on it is a person who assigns ``att_context_size``."""
        self._assigns_default = False

    @contextmanager
    def _assigning_default(self) -> Iterator[None]:
        """Let NeMo's methods assign the default context inside: that is nothing set by hand."""
        before, self._assigns_default = self._assigns_default, True
        try:
            yield
        finally:
            self._assigns_default = before
