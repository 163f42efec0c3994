# SPDX-License-Identifier: Apache-2.0
"""A model whose attention context is set by hand, comes with a batch, or is drawn. New in this project.

The model's encoder decides on the context (``BatchContext``); this tells the masking, and the trainer's batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.dynamic_context import sync_masking_to_attention
from nemo.collections.asr.parts.att_context.encoder_protocol import FollowsContexts, tightest_window_of
from nemo.collections.asr.parts.att_context.masking_context import (
    follow_left_context,
    followed_left_context,
    follows_context,
    window_arguments,
)
from nemo.utils import logging


class ContextState(NamedTuple):
    """All that setting a context by hand changes, to go back to."""

    encoder: tuple[list, AttContext | None]
    """The encoder's ``att_context_state``."""
    masking_left: int | None
    """What the masking follows, in attention frames; None for a masking that takes no context."""


class AttContextMixin:
    """Mixin for a model with an ``encoder`` and, where it masks, a ``mask_processor``."""

    _masking_left_before: int | None = None  # where a context is set by hand: what the masking followed before

    def set_att_context_size(self, context) -> None:
        """Attend and mask within this context until told otherwise.

        It becomes the encoder's default, which the streaming parameters follow, and it holds in training: nothing is
        drawn, a synced batch's context is passed over; only a curriculum's ceiling still narrows it. Configs and
        checkpoints do not know of it.

        Args:
            context: a pair [left, right] in attention frames (list, tuple or ListConfig; -1 = unlimited), an int (the
                left context, with right 0), the name of a preset, an ``AttContext``; or None: back to the contexts of
                the config, in training drawn for each batch where there are several.

        Raises:
            ValueError: if it is no context, or the encoder cannot follow it.
        """
        if not self._encoder_follows_contexts():
            raise ValueError(f"{type(self.encoder).__name__} has no attention context to set")
        masking = self._masking()
        self.encoder.set_att_context_size(context)
        if self.encoder.att_context_by_hand is None:
            if self._masking_left_before is not None:
                follow_left_context(masking, self._masking_left_before)
            self._masking_left_before = None
            return
        if self._masking_left_before is None:
            self._masking_left_before = followed_left_context(masking)
        context = self.encoder.att_context_size
        if hasattr(masking, 'left_context_size'):
            sync_masking_to_attention(self)
            logging.info(f"Attention context {context}, masking context {masking.left_context_size}")
        else:
            logging.warning(f"Attention context {context}; the masking takes none, it masks regardless.")

    @contextmanager
    def using_att_context_size(self, context) -> Iterator[None]:
        """Set the context as :meth:`set_att_context_size` does, and afterwards go back to what was before."""
        if not self._encoder_follows_contexts():
            raise ValueError(f"{type(self.encoder).__name__} has no attention context to set")
        before = ContextState(self.encoder.att_context_state(), followed_left_context(self._masking()))
        masking_left_before = self._masking_left_before
        self.set_att_context_size(context)
        try:
            yield
        finally:
            self.encoder.restore_att_context_state(before.encoder)
            if before.masking_left is not None:
                follow_left_context(self._masking(), before.masking_left)
            self._masking_left_before = masking_left_before

    @property
    def att_context_set_by_hand(self) -> list | None:
        """The context set by hand, on the model or its encoder, that holds at present; None: those of the config."""
        by_hand = getattr(self.encoder, 'att_context_by_hand', None)
        return None if by_hand is None else list(by_hand)

    def masking_arguments(self, current_frame=None) -> dict:
        """Return the keyword arguments that bind the masking to the present context; none for one that takes none.

        Args:
            current_frame: mask frames received so far, an int or a tensor [B]; None: the utterances are whole.

        Raises:
            ValueError: if ``current_frame`` is given and the masking does not take it.
        """
        masking = self._masking()
        if not follows_context(masking):
            if current_frame is not None:
                raise ValueError(f"current_frame is given, but {type(masking).__name__} does not take it")
            return {}
        return {'current_frame': current_frame, **window_arguments(masking, tightest_window_of(self.encoder))}

    def check_masking_can_be_answered(self) -> None:
        """Check that in every context that a batch can have some layer sees a frame beside the one that is masked.

        Raises:
            ValueError: naming the context in which none does. Nothing would be masked there, and the loss be 0.
        """
        masking = self._masking()
        if not self._encoder_follows_contexts() or not follows_context(masking):
            return
        if not getattr(masking, 'follow_context', True):
            return
        by_hand = self.encoder.att_context_by_hand
        for context in self.encoder.att_context_size_all if by_hand is None else [by_hand]:
            with self.encoder.using_att_context_size(context):
                window = tightest_window_of(self.encoder)
            configured = getattr(masking, 'configured_left_context_size', UNLIMITED)
            if window is not None and not window.shows_others:
                raise ValueError(
                    f"model.encoder.att_context_size {list(context)}: no layer sees any frame beside the one that is "
                    "masked, so nothing could be predicted; give it a left context of 1 or more, or a look-ahead"
                )
            if configured == 0 and window is not None and window.context.right == 0:
                raise ValueError(
                    f"model.masking.left_context_size is 0 and att_context_size {list(context)} has no look-ahead: no "
                    "masked frame could be predicted; it must be 1 or more, or -1 for what the attention sees"
                )

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        """Move a batch; the draw of its context is numbered by the global step, which only the trainer knows."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        draw = getattr(batch, 'context_draw', None)
        if draw is None:
            return moved
        return draw.attach(moved, batch.att_context if self._trainer is None else draw.at(self._trainer.global_step))

    def _context_of_step(self, batch):
        """Pin the context of a training step; see ``precedence.context_of_batch`` for whose it is.

        Draws are a pure function of the step, so the ranks agree without a word, and the batches of one gradient
        accumulation share a context.
        """
        if not self._encoder_follows_contexts():
            return nullcontext()
        with_batch, step = getattr(batch, 'att_context', None), self.trainer.global_step
        return self.encoder.using_att_context_size(self.encoder.att_context_of_batch(with_batch, step))

    def _one_context(self):
        """Keep the pinned context, or pin one, for all that is inside a ``with`` block."""
        return self.encoder.using_one_att_context_size() if self._encoder_follows_contexts() else nullcontext()

    def _encoder_follows_contexts(self) -> bool:
        return isinstance(self.encoder, FollowsContexts)

    def _masking(self):
        return getattr(self, 'mask_processor', None)
