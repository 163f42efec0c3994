# SPDX-License-Identifier: Apache-2.0
"""What a step of live streams gives out.

Shapes: B streams, M mask frames, D the encoder's width, A attention frames, S target frames, K horizons, C classes,
H codebooks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nemo.collections.asr.parts.streaming.text import TextUpdate

JOINED = {  # dimension of the frames, and which counts there are of them
    'encoded': (2, 'lengths'),
    'log_probs': (1, 'lengths'),
    'tokens': (1, 'lengths'),
    'masks': (1, 'mask_lengths'),
    'next_tokens': (1, 'lengths'),
    'surprise': (1, 'surprise_lengths'),
}


@dataclass
class StreamingOutput:
    """What one step gave out. Frames at or beyond a stream's length are 0."""

    encoded: torch.Tensor
    """Encoder frames, [B, D, A]."""
    lengths: torch.Tensor
    """How many of them each stream has, [B] int64."""
    current_frame: torch.Tensor
    """Mask frames received by each stream since its beginning, [B] int64: feature frames, or attention frames for a
    model that masks after its convolutions."""
    failed: dict[int, str] = field(default_factory=dict)
    """The streams that have failed since they were last reset, with the reason; they give no frames."""
    log_probs: torch.Tensor | None = None
    """With ``return_log_probs``: [B, A, C] or [B, A, C, H], as the model's decoder gives them."""
    tokens: torch.Tensor | None = None
    """With ``return_tokens``: the likeliest class of each frame, [B, A] or [B, A, H] int64; for a CTC model the greedy
    path, blanks and repetitions included."""
    masks: torch.Tensor | None = None
    """With ``apply_mask``: which of the new mask frames are masked, [B, M], 1 where masked."""
    mask_lengths: torch.Tensor | None = None
    """How many mask frames are new in each stream, [B] int64."""
    loss: torch.Tensor | None = None
    """With ``apply_mask``: nats per masked frame, over the frames whose target and prediction this step completed."""
    masked_frames: int = 0
    """With ``apply_mask``: how many frames that is."""
    next_tokens: torch.Tensor | None = None
    """With ``return_surprise``: the likeliest token of each horizon for each new frame, [B, A, K] or [B, A, K, H]
    int64. Frame j predicts at horizon k token j + ``session.next_token_offset`` + k."""
    surprise: torch.Tensor | None = None
    """With ``return_surprise``: nats (the mean over the codebooks) of each token that was predicted at the first horizon
    and is known since this step, [B, S]."""
    surprise_lengths: torch.Tensor | None = None
    """How many of these each stream has, [B] int64."""
    surprise_start: torch.Tensor | None = None
    """Which token of its stream the first of these is, from 0, or will be if there is none yet, [B] int64."""
    text: list[TextUpdate] | None = None
    """With ``return_text``: what is new in the text of each stream."""

    @classmethod
    def concatenate(cls, outputs: Sequence['StreamingOutput']) -> 'StreamingOutput':
        """Join outputs of consecutive steps, stream by stream; ``loss`` becomes that of all masked frames.

        Raises:
            ValueError: if there is none.
        """
        if not outputs:
            raise ValueError("concatenate: there is no output to join")
        first, last = outputs[0], outputs[-1]
        joined = cls(None, None, last.current_frame, last.failed, surprise_start=first.surprise_start)
        for name, (dim, counts) in JOINED.items():
            if getattr(first, name) is not None:
                sizes = [getattr(output, counts) for output in outputs]
                setattr(joined, name, _join([getattr(output, name) for output in outputs], sizes, dim))
                setattr(joined, counts, sum(sizes))
        if first.text is not None:
            joined.text = [*map(TextUpdate.concatenate, zip(*(output.text for output in outputs)))]
        if first.loss is not None:
            joined.masked_frames = sum(output.masked_frames for output in outputs)
            total = sum(output.loss * output.masked_frames for output in outputs)  # type: ignore[operator, misc]
            joined.loss = total / max(joined.masked_frames, 1)
        return joined


def _join(tensors, lengths, dim: int) -> torch.Tensor:
    """Join tensors of consecutive steps along ``dim``, leaving out the padding of each stream."""
    rows = []
    for row in range(tensors[0].shape[0]):
        parts = [tensor[row].narrow(dim - 1, 0, int(length[row])) for tensor, length in zip(tensors, lengths)]
        rows.append(torch.cat(parts, dim=dim - 1).transpose(0, dim - 1))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, dim)


def valid_frames(output: StreamingOutput) -> torch.Tensor:
    """Return which frames are a stream's own, [B, A], True where they are."""
    return torch.arange(output.encoded.shape[2], device=output.lengths.device) < output.lengths[:, None]
