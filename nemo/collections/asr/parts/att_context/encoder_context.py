# SPDX-License-Identifier: Apache-2.0
"""The context of a batch, for an encoder: a policy, an override, and the active context of a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.policy import ContextPolicy, ContextSampler
from nemo.utils import logging

PASSES_KEPT = 16  # forward passes in training whose context a recomputation finds again


class EncoderContext:
    """Mixin for an encoder with NeMo's arguments for contexts, ``att_context_...``.

    NeMo's methods that assign ``att_context_size`` run within :meth:`_assigning_default`; other assignments set the
    override. Methods take what ``AttContext.parse`` reads, and raise ValueError for what is no context, or one that the
    encoder's attention does not support.
    """

    att_context_policy: ContextPolicy = None  # type: ignore[assignment]  # of training, and the default
    att_context_override: AttContext | None = None  # what set_att_context_size has set; None: the policy holds
    _active: AttContext | None = None
    _draws = 0  # steps counted by the encoder, where the caller passes none
    _passes: dict[tuple[int, torch.Size], AttContext] = {}  # the contexts of the last forward passes in training
    _assigns_default = True  # whether NeMo assigns att_context_size; so it does during construction

    def _set_policy(self, sampler: ContextSampler | None, seed: int, shared: bool) -> None:
        """Make the policy from the constructor's arguments; from now on assignments set the override."""
        if not isinstance(shared, bool):
            raise ValueError(f"model.encoder.att_context_shared is {shared!r}; it must be true or false")
        self.att_context_policy = replace(
            self.att_context_policy,
            options=tuple(self.parse_att_context_size(context) for context in self.att_context_size_all),
            probabilities=tuple(self.att_context_probs),
            sampler=sampler,
            seed=seed,
            shared=shared,
        )
        self._assigns_default = False

    @property
    def att_context_size(self) -> list[int]:
        """The present context: active, else override, else default; assigning sets the override."""
        return list(self._present_context())

    @att_context_size.setter
    def att_context_size(self, att_context_size: Any) -> None:
        if not self._assigns_default:
            self.set_att_context_size(att_context_size)
            return
        policy = self.att_context_policy or ContextPolicy(None, style=self.att_context_style)  # type: ignore[arg-type]
        default = self.parse_att_context_size(att_context_size)
        self.att_context_policy, self.att_context_override = replace(policy, default=default), None

    def _present_context(self) -> AttContext:
        if self._active is not None:
            return self._active
        return self.att_context_policy.default if self.att_context_override is None else self.att_context_override

    def set_att_context_size(self, att_context_size: Any) -> None:
        """Override the policy in training, validation and inference, as assigning ``att_context_size`` does.

        Streaming parameters follow it; configs and checkpoints do not contain it. None, or the list of all configured
        contexts, clears it.
        """
        context = None
        if att_context_size is not None and att_context_size != self.att_context_size_all:
            context = self.parse_att_context_size(att_context_size)
            self.check_att_context_size(context)
            if context != self.att_context_override and not self.att_context_policy.covers(context):
                logging.warning(
                    f"encoder.att_context_size is set to {list(context)}, a context that the model was not trained "
                    f"on; it was trained on {self.att_context_policy}"
                )
        if context != self.att_context_override:
            self.att_context_override = context
            self.setup_streaming_params()

    @contextmanager
    def using_att_context_size(self, att_context_size: Any) -> Iterator[AttContext]:
        """Make a context the active one: all inside uses it, but streaming parameters do not change."""
        context = self.parse_att_context_size(att_context_size)
        self._check_can_attend_within(context)
        before, self._active = self._active, context
        try:
            yield context
        finally:
            self._active = before

    def _context_of_pass(self, signal: torch.Tensor) -> AttContext:
        """Return the context of a forward pass; its recomputation for the backward pass has the same."""
        if torch.compiler.is_compiling():
            return self.att_context_of_batch()
        recomputes = torch._C._current_graph_task_id() != -1  # within a backward pass
        place = signal.data_ptr(), signal.shape  # checkpointing keeps the signal until it recomputes
        if recomputes and place in self._passes:
            return self._passes[place]
        context = self.att_context_of_batch()
        kept = [item for item in self._passes.items() if item[0] != place][-PASSES_KEPT:]
        self._passes = {**dict(kept), place: context}
        return context

    def att_context_of_batch(self, with_batch: Any = None, step: int | None = None) -> AttContext:
        """Return the context of a batch, without making it active.

        Precedence: active, override, ``with_batch`` (came with the batch), in training the policy, default. In training
        the ceiling narrows each of them. ``step`` is the training step; None takes the encoder's own count of draws.
        """
        policy = self.att_context_policy
        if self._active is not None or self.att_context_override is not None:
            context = self._present_context()
        elif with_batch is not None:
            context = self.parse_att_context_size(with_batch)
        else:
            context = self._drawn(step) if self.training and policy.draws else policy.default
        return policy.narrowed(context) if self.training else context

    def draw_att_context_size(self, step: int | None = None) -> AttContext:
        """Return the context of a batch without its own; see :meth:`att_context_of_batch`."""
        return self.att_context_of_batch(step=step)

    @torch.compiler.disable  # it would be recompiled for each step
    def _drawn(self, step: int | None) -> AttContext:
        if step is None:
            step, self._draws = self._draws, self._draws + 1
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        return self.att_context_policy.at(step, torch.distributed.get_rank() if ranks else 0)

    def parse_att_context_size(self, att_context_size: Any, field: str = 'encoder.att_context_size') -> AttContext:
        """Read a context, named ``field`` in errors; ``chunked_limited_with_rc``'s three numbers are a tuple."""
        if self.att_context_style == 'chunked_limited_with_rc' and not isinstance(att_context_size, AttContext):
            return tuple(att_context_size)  # type: ignore[return-value]  # NeMo 3.0 reads it
        return AttContext.parse(att_context_size, field=field)

    def check_att_context_size(self, att_context_size: Any) -> None:
        """Raise ValueError if the encoder's attention, or a layer's, does not support this context of a batch."""
        context = self.parse_att_context_size(att_context_size)
        self._check_can_attend_within(context)
        self.effective_att_contexts(context)

    def check_att_context_ceiling(self, ceiling: AttContext, where: str) -> None:
        """Raise ValueError, beginning with ``where``, if the attention does not support this ceiling."""
        self._check_can_narrow(where)
        for batch in self.att_context_policy.contexts():
            narrowed = self.att_context_policy.narrowed(batch, ceiling, where)
            for own in {*self.layer_att_contexts()} - {None}:
                self.att_context_policy.within(narrowed, own, f'{where}: a layer has {own.as_list()}, and')

    @contextmanager
    def _assigning_default(self) -> Iterator[None]:
        """Inside, an assignment of ``att_context_size`` sets the policy's default and clears the override."""
        before, self._assigns_default = self._assigns_default, True
        try:
            yield
        finally:
            self._assigns_default = before
