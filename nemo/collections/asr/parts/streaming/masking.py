# SPDX-License-Identifier: Apache-2.0
"""Masking inside a live stream, and the loss of the masked frames as they come.

Only new frames are masked. What was drawn before is remembered (``MaskedTimeLine``), so that masks do not depend on how the
stream is cut. A masking module that does not take ``stream`` is called for the frames received so far that the attention
reaches, with ``current_frame`` their number; then the part of its masks that lies on the new frames is kept.

Shapes: F features (or the encoder's width), M mask frames, S target frames, A attention frames, C classes,
H codebooks.
"""

from dataclasses import dataclass

import torch

from nemo.collections.asr.modules.ssl_modules.masked_time_line import MaskedTimeLine
from nemo.collections.asr.parts.att_context.context import UNLIMITED
from nemo.collections.asr.parts.att_context.visible_frames import follows_context, takes, window_of_masking
from nemo.collections.asr.parts.att_context.windows import tightest_window
from nemo.collections.asr.parts.streaming.state import joined

LONGEST_REACH = 400  # attention frames that a mask is drawn over where the left context has no limit


@dataclass
class MaskedStream:
    """The state of one stream that is masked."""

    recent: torch.Tensor
    """The last mask frames as they were received, as far as a mask is drawn over them, [F, M]."""
    masks: torch.Tensor
    """Of frames without a loss so far, [1, M]."""
    tokens: torch.Tensor | None = None
    """Targets without a loss so far, [S] or [S, H]."""
    log_probs: torch.Tensor | None = None
    """Predictions without a loss so far, after ``decoder_offset``, which the loss drops, [A, C] or [A, C, H]."""
    time_line: MaskedTimeLine | None = None
    """What was drawn so far; None for a masking module that does not take it."""


class LiveMasking:
    """Masks streams for a model of masked token prediction, and computes their loss.

    Args:
        model: an ``EncDecMaskedTokenPredModel`` or its denoising subclass.
        context: the attention context that the streams are encoded in.

    Raises:
        ValueError: if the model is no such, or its masking does not follow a context.
    """

    def __init__(self, model, context):
        if not all(hasattr(model, name) for name in ('mask_processor', 'quantizer', 'loss')):
            raise ValueError(f"apply_mask needs a masked token prediction model; {type(model).__name__} is none")
        if not model.objectives.masks:
            raise ValueError(f"apply_mask: model.objective is {model.objective}, which predicts no masked tokens")
        self.masking, self.loss = model.mask_processor, model.loss
        if not follows_context(self.masking):
            raise ValueError(f"apply_mask: {type(self.masking).__name__} does not take current_frame")
        self._window = tightest_window(model.encoder.effective_windows(context))
        left = self._window.context.left
        self.reach = (LONGEST_REACH if left == UNLIMITED else left) * model.mask_frames_per_attention_frame

    def new_stream(self, device) -> MaskedStream:
        """The state of a stream before its first frame."""
        recent = torch.zeros(self.masking.mask_embedding.shape[0], 0, device=device)
        time_line = self.masking.new_stream(1, device) if takes(self.masking, 'stream') else None
        return MaskedStream(recent, recent[:1], time_line=time_line)

    def mask(self, stream: MaskedStream, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new mask frames [F, M], one or more; return them as the encoder is to see them, and their masks [1, M]."""
        new = frames.shape[1]
        drawn_over = torch.cat((stream.recent.to(frames.dtype), frames), dim=1)[:, -max(self.reach, new) :]
        count = torch.tensor([drawn_over.shape[1]], device=frames.device)
        arguments = window_of_masking(self.masking, self._window)
        if stream.time_line is not None:
            stream.time_line.forget(drawn_over.shape[1] - new)
            arguments['stream'] = stream.time_line
        masked, masks = self.masking(
            input_feats=drawn_over.unsqueeze(0), input_lengths=count, current_frame=count, **arguments
        )
        stream.recent = drawn_over[:, max(drawn_over.shape[1] - self.reach, 0) :].float().clone()
        masks = masks[0, :1, -new:]
        stream.masks = torch.cat((stream.masks, masks.to(stream.masks.dtype)), dim=1)
        return masked[0, :, -new:], masks

    def score(self, stream: MaskedStream, log_probs: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Take new predictions [A, C] or [A, C, H], and score all masked frames that now have target and prediction.

        Returns:
            the sum over frames of the mean over codebooks, in nats, and the number of these frames.
        """
        stream.log_probs = log_probs = joined(stream.log_probs, log_probs)
        if stream.tokens is None or not log_probs.shape[0]:
            return log_probs.new_zeros(()), 0
        loss, masks = self.loss, stream.masks.unsqueeze(0)
        aligned, targets, counted = loss.align(log_probs.unsqueeze(0), stream.tokens.unsqueeze(0), masks)
        ready = aligned.shape[1]
        lost = loss.of_frames(aligned[0], targets[0], reduction='none')
        stream.log_probs, stream.tokens = log_probs[ready:].clone(), stream.tokens[ready:].clone()
        stream.masks = stream.masks[:, ready * getattr(loss, 'mlm_loss', loss).combine_time_steps :].clone()
        return lost[counted[0]].sum(), int(counted.sum())
