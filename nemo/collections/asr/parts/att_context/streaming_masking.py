# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Masking inside a live stream, and the loss of the masked frames as they come.

What has been encoded stays encoded: a mask takes effect on new frames only. It is drawn over the frames received so
far that the attention's window reaches, with ``current_frame`` their number, as the model draws it; then the part of
it that lies on the new frames is kept. So a stream should be fed at least an attention frame at a time.

Targets are normalised as in training, but by the statistics of the frames received so far.

Shapes: F features (or the encoder's width), M mask frames, S target frames, A attention frames, C classes,
H codebooks.
"""

from dataclasses import dataclass, field
from typing import Optional

import torch

from nemo.collections.asr.parts.att_context.answerability import MASK_THRESHOLD, masked_share_per_frame
from nemo.collections.asr.parts.att_context.context import UNLIMITED

LONGEST_WINDOW = 400  # attention frames that a mask is drawn over where the left context has no limit
SMALLEST_STD = 1e-5  # as in NeMo's per_feature normalisation


@dataclass
class MaskedStream:
    """The state of one stream that is masked."""

    window: torch.Tensor
    """The last mask frames as they were received, [F, M]."""
    unaimed: torch.Tensor
    """Those that do not make a whole target yet, [F, M]."""
    total: torch.Tensor
    """Sum over the frames received, [F] float64."""
    squares: torch.Tensor
    """Sum of their squares, [F] float64."""
    count: int = 0
    """Mask frames received."""
    unheard: int = 0
    """Leading decoder frames that no target belongs to and that are still to come."""
    masks: Optional[torch.Tensor] = None
    """Of frames without a loss so far, [1, M]."""
    tokens: Optional[torch.Tensor] = None
    """Targets without a loss so far, [S, H]."""
    log_probs: Optional[torch.Tensor] = None
    """Predictions without a loss so far, [A, C, H]."""


@dataclass
class StepLoss:
    """The loss of the masked frames of a step."""

    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """Sum over frames of the mean over codebooks, in nats."""
    frames: int = 0
    """Masked frames whose target and prediction this step completed."""

    @property
    def mean(self) -> torch.Tensor:
        """Nats per masked frame, 0 where there is none."""
        return self.total / max(self.frames, 1)


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
        if not model._masking_follows_context:
            raise ValueError(f"apply_mask: {type(model.mask_processor).__name__} does not take current_frame")
        self.model, self.context = model, context
        self.pre_conv = model.pre_encoder is None
        with model.encoder.using_att_context_size(context):
            left = model.encoder.tightest_left_context()
        attention_frames = LONGEST_WINDOW if left == UNLIMITED else left
        self.window = attention_frames * (model.encoder.subsampling_factor if self.pre_conv else 1)
        self._loss = getattr(model.loss, 'mlm_loss', model.loss)
        self._combined = getattr(model.quantizer, 'combine_time_steps', 1)

    def new_stream(self, device) -> MaskedStream:
        """The state of a stream before its first frame."""
        features = self.model.mask_processor.mask_embedding.shape[0]
        empty = torch.zeros(features, 0, device=device)
        sums = torch.zeros(features, dtype=torch.float64, device=device)
        return MaskedStream(empty, empty, sums, sums, unheard=getattr(self._loss, 'decoder_offset', 0))

    def mask(self, stream: MaskedStream, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new mask frames and mask among them.

        Args:
            stream: its state, which moves on.
            frames: [F, M].

        Returns:
            the frames as the encoder is to see them, [F, M], and their masks [1, M], 1 where masked.
        """
        new = frames.shape[1]
        if new == 0:
            return frames, frames[:1]
        window = torch.cat((stream.window, frames), dim=1)
        window = window[:, max(window.shape[1] - max(self.window, new), 0) :]
        seen, masks = self._draw(window)
        stream.window = window[:, max(window.shape[1] - self.window, 0) :].clone()
        self._aim(stream, frames)
        seen, masks = seen[:, -new:], masks[:1, -new:]
        stream.masks = masks if stream.masks is None else torch.cat((stream.masks, masks), dim=1)
        return seen, masks

    def _draw(self, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        received = torch.tensor([window.shape[1]], device=window.device)
        with self.model.encoder.using_att_context_size(self.context):
            arguments = self.model._masking_arguments(current_frame=received)
        seen, masks = self.model.mask_processor(input_feats=window.unsqueeze(0), input_lengths=received, **arguments)
        return seen[0], masks[0]

    def _aim(self, stream: MaskedStream, frames: torch.Tensor) -> None:
        """Make targets of the new frames; those that make no whole target wait."""
        stream.count += frames.shape[1]
        stream.total = stream.total + frames.double().sum(dim=1)
        stream.squares = stream.squares + frames.double().square().sum(dim=1)
        frames = torch.cat((stream.unaimed, frames), dim=1)
        whole = frames.shape[1] // self._combined * self._combined
        stream.unaimed, frames = frames[:, whole:].clone(), frames[:, :whole]
        if whole == 0:
            return
        if self.model.target_normalize == 'per_feature':
            frames = _standardize(stream, frames)
        _, tokens = self.model.quantizer(input_signal=frames.unsqueeze(0))
        tokens = tokens[0] if tokens.dim() == 3 else tokens[0].unsqueeze(-1)
        stream.tokens = tokens if stream.tokens is None else torch.cat((stream.tokens, tokens))

    def score(self, stream: MaskedStream, log_probs: torch.Tensor) -> StepLoss:
        """Take new predictions; return the loss of all masked frames that now have target and prediction.

        Args:
            stream: its state, which moves on.
            log_probs: [A, C] or [A, C, H].
        """
        log_probs = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(-1)
        dropped = min(stream.unheard, log_probs.shape[0])
        stream.unheard -= dropped
        log_probs = log_probs[dropped:]
        if stream.log_probs is not None:
            log_probs = torch.cat((stream.log_probs, log_probs))
        combined = getattr(self._loss, 'combine_time_steps', 1)
        ready = 0
        if stream.tokens is not None:
            ready = min(log_probs.shape[0], stream.tokens.shape[0], stream.masks.shape[1] // combined)
        stream.log_probs = log_probs[ready:].clone()
        if ready == 0:
            return StepLoss(log_probs.new_zeros(()))
        tokens, masks = stream.tokens[:ready], stream.masks[:, : ready * combined]
        stream.tokens, stream.masks = stream.tokens[ready:], stream.masks[:, ready * combined :]
        share = masked_share_per_frame(masks.unsqueeze(0), combined)[0]
        counted = share > getattr(self._loss, 'mask_threshold', MASK_THRESHOLD)
        lost = -log_probs[:ready].gather(1, tokens.unsqueeze(1)).squeeze(1).mean(dim=1)
        return StepLoss(lost[counted].sum(), int(counted.sum()))


def _standardize(stream: MaskedStream, frames: torch.Tensor) -> torch.Tensor:
    """Give every feature zero mean and unit variance by the statistics of the stream so far."""
    mean = stream.total / stream.count
    variance = (stream.squares - stream.count * mean.square()).clamp(min=0) / max(stream.count - 1, 1)
    std = variance.sqrt() + SMALLEST_STD
    return ((frames.double() - mean[:, None]) / std[:, None]).to(frames.dtype)
