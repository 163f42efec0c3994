# SPDX-License-Identifier: Apache-2.0
"""A model whose encoder holds the attention context: sets it there, and reads that of a batch."""

from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch import LightningModule

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.synced_collate import attach_context
from nemo.collections.asr.parts.att_context.visible_frames import follows_context, takes, window_of_masking
from nemo.collections.asr.parts.att_context.windows import tightest_window_of


class AttContextMixin(LightningModule):
    """Mixin for a model with an ``encoder`` and, where it masks, a ``mask_processor``."""

    def set_att_context_size(self, context) -> None:
        """Override the context policy for attention and masking; None clears it. See ``AttContext.parse``.

        Raises:
            ValueError: if it is no context, or the encoder does not support it.
            AttributeError: if the encoder has no contexts.
        """
        self.encoder.set_att_context_size(context)

    def using_att_context_size(self, context) -> AbstractContextManager[AttContext]:
        """Make a context the active one inside a ``with`` block; see :meth:`set_att_context_size`."""
        return self.encoder.using_att_context_size(context)

    @property
    def att_context_override(self) -> AttContext | None:
        """The encoder's override; None: its policy holds."""
        return getattr(self.encoder, 'att_context_override', None)

    def masking_arguments(self, current_frame=None) -> dict:
        """Return the keyword arguments of a call of the masking; no window if it reads the encoder's.

        Raises:
            ValueError: if the masking does not take a given ``current_frame``; in training also for a context [0, 0].
        """
        masking, arguments = self.mask_processor, {}
        if getattr(masking, 'attention_window', None) is None:
            arguments = window_of_masking(masking, tightest_window_of(self.encoder))
        if self.training and self._encoder_has_context() and self.encoder.att_context_size == [0, 0]:
            self._check_frames_see_others()
        if current_frame is None:
            return arguments
        if not takes(masking, 'current_frame'):
            raise ValueError(f"current_frame is given, but {type(masking).__name__} does not take it")
        return {**arguments, 'current_frame': current_frame}

    def trained_contexts(self) -> list:
        """Return the contexts of the encoder's config and of ``train_ds.synced_contexts``, or the override alone."""
        synced = (self.cfg.get('train_ds') or {}).get('synced_contexts') or {}
        contexts = [*self.encoder.att_context_size_all, *(synced.get('context_options') or ())]
        return contexts if self.att_context_override is None else [self.att_context_override]

    def check_frames_see_others(self) -> None:
        """Raise ValueError naming a context of training in which no layer sees another frame."""
        if self._encoder_has_context():
            for context in self.trained_contexts():
                with self.encoder.using_att_context_size(context):
                    self._check_frames_see_others()

    def _check_frames_see_others(self) -> None:
        masking, window = self.mask_processor, tightest_window_of(self.encoder)
        follows = follows_context(masking) and getattr(masking, 'follow_context', True)
        if not follows or window is None or window.context.right != 0:
            return
        context = list(self.encoder.att_context_size)
        if not window.sees_other_frames:
            raise ValueError(
                f"model.encoder.att_context_size {context}: no layer sees another frame, so "
                "masked frames cannot be predicted; set a left context of 1 or more, or a look-ahead"
            )
        if getattr(masking, 'left_context_size', UNLIMITED) == 0:
            raise ValueError(
                f"model.masking.left_context_size is 0 and att_context_size {context} has no look-ahead: no masked "
                "frame could be predicted; it must be 1 or more, or -1 for what the attention sees"
            )

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        """Move a batch; under a trainer its context is drawn again, by the global step."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        draw = getattr(batch, 'context_draw', None)
        if draw is None:
            return moved
        context = batch.att_context if self._trainer is None else draw.at(self._trainer.global_step)
        return attach_context(moved, context, draw)

    def _one_context(self, batch=None) -> AbstractContextManager[AttContext | None]:
        """Make one context active: the batch's, the one of the global step, or one that the encoder draws.

        Inference without a batch of a step sets none, so that threads can share a model.
        """
        if not self._encoder_has_context() or (batch is None and not self.encoder.training):
            return nullcontext()
        of_step = () if batch is None else (getattr(batch, 'att_context', None), self.trainer.global_step)
        return self.encoder.using_att_context_size(self.encoder.att_context_of_batch(*of_step))

    def _encoder_has_context(self) -> bool:
        return hasattr(self.encoder, 'att_context_of_batch')
