# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``mlm.py``: masked loss for encoders whose lengths differ from the targets'.

Shapes: B batch, T decoder frames, S target frames, M mask frames (M // combine_time_steps attention frames),
F frames in common, C classes, H codebooks.
"""

from typing import Any

import torch

from nemo.collections.asr.parts.att_context.visible_frames import masked_share_per_frame
from nemo.core import Loss, typecheck
from nemo.core.neural_types import NeuralType
from nemo_streaming_ssl import upstream

_up = upstream(globals())

IGNORED_TARGET = -100  # as torch.nn.NLLLoss, which stock uses


def has_target(targets: torch.Tensor, dimensions: int = 1) -> torch.Tensor:
    """Return which frames, the first dimensions of targets, have one in any further dimension; bool."""
    present = targets != IGNORED_TARGET
    while present.dim() > dimensions:
        present = present.any(dim=-1)
    return present


class _LossOfFrames(Loss):
    """Common part of the losses of one and of several codebooks; NeMo's arguments and ``decoder_offset``."""

    combine_time_steps: int
    mask_threshold: float
    several_books = False
    """Whether log-probabilities and targets have a dimension H."""

    def __init__(self, *args: Any, decoder_offset: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if decoder_offset < 0:
            raise ValueError(f"loss.decoder_offset is {decoder_offset}; it must be 0 decoder frames or more")
        self.decoder_offset = decoder_offset

    @property
    def input_types(self) -> dict[str, NeuralType]:
        """Return NeMo's, with masks of [B, D, T] or [B, T]: a type with axes has one number of dimensions."""
        return {**super().input_types, 'masks': NeuralType(optional=True), 'spec_masks': NeuralType(optional=True)}

    @typecheck()
    def forward(
        self,
        decoder_outputs: torch.Tensor,
        targets: torch.Tensor,
        decoder_lengths: torch.Tensor | None = None,
        target_lengths: torch.Tensor | None = None,
        spec_masks: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss, a scalar, at least float32.

        Args:
            decoder_outputs: log-probabilities [B, T, C] or [B, T, C, H], any floating dtype.
            targets: tokens [B, S] or [B, S, H] int64; -100 is left out, as in NeMo.
            decoder_lengths: valid decoder frames [B], before the offset; None: all.
            target_lengths: not used, as in NeMo.
            masks, spec_masks: one of them [B, D, M] or [B, M], 1 or True where masked. None: every frame is a loss position.
        """
        masks = spec_masks if masks is None else masks
        decoder_outputs, targets, loss_mask = self.align(decoder_outputs, targets, masks, decoder_lengths)
        loss_mask = loss_mask.view(*loss_mask.shape, *[1] * (targets.dim() - 2))
        return self.of_frames(decoder_outputs, torch.where(loss_mask, targets, IGNORED_TARGET))

    def of_frames(self, log_probs: torch.Tensor, targets: torch.Tensor, reduction: str = 'mean') -> torch.Tensor:
        """Return the loss of aligned frames, the mean over the codebooks.

        Args:
            log_probs: [..., C] or [..., C, H], any floating dtype.
            targets: tokens [...] or [..., H] int64; -100 where there is none.
            reduction: ``mean`` over the frames with a target, or ``none`` for the loss of each [...], 0 without a target.
        """
        if not self.several_books:
            log_probs, targets = log_probs.unsqueeze(-1), targets.unsqueeze(-1)
        valid = targets != IGNORED_TARGET
        log_likelihood = log_probs.gather(-2, torch.where(valid, targets, 0).unsqueeze(-2)).squeeze(-2)
        log_likelihood = log_likelihood.to(torch.promote_types(log_likelihood.dtype, torch.float32))
        lost = -torch.where(valid, log_likelihood, 0.0)
        if reduction == 'none':
            return lost.mean(dim=-1)
        frames = tuple(range(targets.dim() - 1))
        return (lost.sum(dim=frames) / valid.sum(dim=frames).clamp(min=1)).mean()

    def align(
        self,
        decoder_outputs: torch.Tensor,
        targets: torch.Tensor,
        masks: torch.Tensor | None = None,
        decoder_lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cut outputs (or the frames that they are computed from, [B, T, ...]) and targets to common frames.

        Returns:
            outputs [B, F, ...] and targets [B, F] or [B, F, H], both views, and the loss mask [B, F] bool.
        """
        decoder_outputs = decoder_outputs[:, self.decoder_offset :]
        frames = min(decoder_outputs.shape[1], targets.shape[1])
        if masks is not None:
            frames = min(frames, masks.shape[-1] // self.combine_time_steps)
        decoder_outputs, targets = decoder_outputs[:, :frames], targets[:, :frames]
        loss_mask = has_target(targets, dimensions=2)
        if masks is not None:
            loss_mask &= masked_share_per_frame(masks, self.combine_time_steps)[:, :frames] > self.mask_threshold
        if decoder_lengths is not None:
            index = torch.arange(self.decoder_offset, self.decoder_offset + frames, device=targets.device)
            loss_mask &= index < decoder_lengths.to(targets.device).unsqueeze(1)
        return decoder_outputs, targets, loss_mask


class MLMLoss(_LossOfFrames, _up.MLMLoss):
    """Mean negative log-likelihood of the targets at masked frames; synchronises nothing.

    Decoder outputs, masks and targets are cut to their common length; frames at or beyond ``decoder_lengths`` are left
    out. Without any masked frame the loss is zero and back-propagates.

    Args:
        decoder_offset: leading decoder frames to drop. With causal downsampling frame i + 1, not i, is the first that
            has seen all of target i.

    Raises:
        ValueError: if ``decoder_offset`` is negative.
    """


class MultiMLMLoss(_LossOfFrames, _up.MultiMLMLoss):
    """The mean of :class:`MLMLoss` over several codebooks; arguments as there and in NeMo."""

    needs_labels = True
    """Whether targets are passed. Stock lacks this attribute (NeMo issue 15743)."""
    mlm_loss: MLMLoss

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.combine_time_steps, self.mask_threshold = self.mlm_loss.combine_time_steps, self.mlm_loss.mask_threshold
        self.several_books = not (self.squeeze_single and self.num_decoders == 1)
        # For subclasses of stock's.
        self.mlm_loss = MLMLoss(self.combine_time_steps, self.mask_threshold, decoder_offset=self.decoder_offset)
