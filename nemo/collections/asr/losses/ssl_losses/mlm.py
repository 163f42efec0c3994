# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``mlm.py``: masked prediction loss for encoders whose lengths differ from the targets'.

Shapes: B batch, T decoder frames, S target frames, M mask frames (M // combine_time_steps attention frames),
C classes, H codebooks.
"""

import torch

from nemo.collections.asr.parts.att_context.visible_frames import MASK_THRESHOLD, masked_share_per_frame
from nemo.core import typecheck
from nemo.core.neural_types import NeuralType
from nemo_streaming_ssl import upstream

_up = upstream(globals())

IGNORED_TARGET = -100  # as torch.nn.NLLLoss, which stock uses


class MLMLoss(_up.MLMLoss):
    """Mean negative log-likelihood of the targets at masked frames.

    Decoder outputs, masks and targets are cut to their common length; frames at or beyond ``decoder_lengths`` are left
    out. Without any masked frame the loss is zero and back-propagates. Synchronises nothing.

    Args:
        combine_time_steps: mask frames per target.
        mask_threshold: share of an attention frame's mask frames above which it counts as masked.
        decoder_offset: leading decoder frames to drop. With causal downsampling frame i + 1, not i, is the first that
            has seen all of target i.

    Raises:
        ValueError: if ``decoder_offset`` is negative.
    """

    def __init__(self, combine_time_steps: int = 1, mask_threshold: float = MASK_THRESHOLD, decoder_offset: int = 0):
        super().__init__(combine_time_steps=combine_time_steps, mask_threshold=mask_threshold)
        if decoder_offset < 0:
            raise ValueError(f"loss.decoder_offset is {decoder_offset}; it must be 0 decoder frames or more")
        self.decoder_offset = decoder_offset

    @property
    def input_types(self):
        """Return the definitions of the inputs."""
        return _with_masks_of_either_shape(super().input_types)

    @typecheck()
    def forward(
        self, decoder_outputs, targets, decoder_lengths=None, target_lengths=None, spec_masks=None, masks=None
    ):
        """Compute the loss.

        Args:
            decoder_outputs: log-probabilities [B, T, C], any floating dtype.
            targets: tokens [B, S] int64; -100 is left out, as in NeMo.
            decoder_lengths: valid decoder frames [B], before the offset; None: all.
            target_lengths: not used, as in NeMo.
            spec_masks: masks, used where ``masks`` is None.
            masks: [B, D, M] or [B, M], floating or bool, 1 or True where masked. None: every frame is a loss position.

        Returns:
            The loss, a scalar; float32 for half-precision inputs, else the dtype of ``decoder_outputs``.

        Raises:
            ValueError: if the masks have another number of dimensions.
        """
        masks = spec_masks if masks is None else masks
        decoder_outputs, targets, loss_mask = self.align(decoder_outputs, targets, masks, decoder_lengths)
        return self.of_frames(decoder_outputs, torch.where(loss_mask, targets, IGNORED_TARGET))

    def of_frames(self, log_probs: torch.Tensor, targets: torch.Tensor, reduction: str = 'mean') -> torch.Tensor:
        """Return the loss of aligned frames.

        Args:
            log_probs: [..., C], any floating dtype.
            targets: tokens [...] int64; -100 where there is none.
            reduction: ``mean``: over the frames with a target, a scalar; ``none``: each frame's negative
                log-likelihood [...], 0 without a target.
        """
        valid = targets != IGNORED_TARGET
        log_likelihood = log_probs.gather(-1, torch.where(valid, targets, 0).unsqueeze(-1)).squeeze(-1)
        if log_likelihood.dtype != torch.float64:
            log_likelihood = log_likelihood.float()
        lost = -torch.where(valid, log_likelihood, 0.0)
        return lost if reduction == 'none' else lost.sum() / valid.sum().clamp(min=1)

    def align(
        self,
        decoder_outputs: torch.Tensor,
        targets: torch.Tensor,
        masks: torch.Tensor | None = None,
        decoder_lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cut outputs and targets to their common frames, and find the loss positions.

        Args:
            decoder_outputs: [B, T, ...]: log-probabilities, or the encoder frames that they are computed of.
            targets: tokens [B, S], or [B, S, H] of several codebooks.
            masks, decoder_lengths: as in :meth:`forward`.

        Returns:
            outputs [B, F, ...] and targets [B, F] or [B, F, H], both views, and the loss mask [B, F] bool.
        """
        if masks is not None and masks.dim() not in (2, 3):
            raise ValueError(f"the masks have the shape {list(masks.shape)}; it must be [B, D, T] or [B, T]")
        decoder_outputs = decoder_outputs[:, self.decoder_offset :]
        frames = min(decoder_outputs.shape[1], targets.shape[1])
        if masks is not None:
            frames = min(frames, masks.shape[-1] // self.combine_time_steps)
        decoder_outputs, targets = decoder_outputs[:, :frames], targets[:, :frames]
        loss_mask = targets != IGNORED_TARGET
        if loss_mask.dim() == 3:
            loss_mask = loss_mask.any(dim=2)
        if masks is not None:
            share = masked_share_per_frame(masks, self.combine_time_steps)[:, :frames]
            loss_mask = loss_mask & (share > self.mask_threshold)
        if decoder_lengths is not None:
            index = torch.arange(self.decoder_offset, self.decoder_offset + frames, device=targets.device)
            loss_mask = loss_mask & (index < decoder_lengths.to(targets.device).unsqueeze(1))
        return decoder_outputs, targets, loss_mask


class MultiMLMLoss(_up.MultiMLMLoss):
    """The mean of :class:`MLMLoss` over several codebooks; arguments as there and in NeMo."""

    def __init__(
        self,
        combine_time_steps: int = 1,
        mask_threshold: float = MASK_THRESHOLD,
        num_decoders: int = 1,
        squeeze_single: bool = False,
        decoder_offset: int = 0,
    ):
        super().__init__(combine_time_steps, mask_threshold, num_decoders, squeeze_single)
        self.mlm_loss = MLMLoss(combine_time_steps, mask_threshold, decoder_offset)

    @property
    def needs_labels(self) -> bool:
        """Whether targets are passed: True. Stock lacks this attribute (NeMo issue 15743)."""
        return True

    @property
    def input_types(self):
        """Return the definitions of the inputs."""
        return _with_masks_of_either_shape(super().input_types)

    @typecheck()
    def forward(
        self,
        masks=None,
        decoder_outputs=None,
        targets=None,
        decoder_lengths=None,
        target_lengths=None,
        spec_masks=None,
    ):
        """Compute the loss.

        Args:
            decoder_outputs: log-probabilities [B, T, C, H], or [B, T, C] with ``squeeze_single`` and one codebook.
            targets: tokens [B, S, H], or [B, S].
            masks, decoder_lengths, target_lengths, spec_masks: as in :class:`MLMLoss`.
        """
        masks = spec_masks if masks is None else masks
        decoder_outputs, targets, loss_mask = self.align(decoder_outputs, targets, masks, decoder_lengths)
        loss_mask = loss_mask if targets.dim() == 2 else loss_mask.unsqueeze(-1)
        return self.of_frames(decoder_outputs, torch.where(loss_mask, targets, IGNORED_TARGET))

    def of_frames(self, log_probs: torch.Tensor, targets: torch.Tensor, reduction: str = 'mean') -> torch.Tensor:
        """Return the loss of aligned frames, the mean over the codebooks; see :meth:`MLMLoss.of_frames`.

        Args:
            log_probs: [..., C, H], or [..., C] with ``squeeze_single`` and one codebook.
            targets: tokens [..., H], or [...]; -100 where there is none.
            reduction: ``mean``, or ``none`` for [...], without the codebooks.
        """
        if self.squeeze_single and self.num_decoders == 1:
            return self.mlm_loss.of_frames(log_probs, targets, reduction)
        books = range(self.num_decoders)
        losses = [self.mlm_loss.of_frames(log_probs[..., book], targets[..., book], reduction) for book in books]
        return sum(losses) / self.num_decoders

    def align(self, decoder_outputs, targets, masks=None, decoder_lengths=None):
        """Cut outputs and targets to their common frames; see :meth:`MLMLoss.align`."""
        return self.mlm_loss.align(decoder_outputs, targets, masks, decoder_lengths)


def _with_masks_of_either_shape(input_types: dict) -> dict:
    """Return NeMo's input types, with masks of [B, D, T] or [B, T]: a type with axes has one number of dimensions."""
    return {**input_types, 'masks': NeuralType(optional=True), 'spec_masks': NeuralType(optional=True)}
