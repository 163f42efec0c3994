# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Which masked attention frames the attention can answer.

Shapes: B batch, D features, T mask frames, A attention frames (T // factor).
"""

from typing import Optional

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.layer_masks import STYLES

FAR = 1 << 40  # attention frames, more than any utterance has
MASK_THRESHOLD = 0.8  # an attention frame counts as masked above this share, as in NeMo's MLMLoss


def masked_share_per_frame(masks: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the share of each attention frame that is masked, [B, A] float32.

    Args:
        masks: [B, D, T], 1 or True where masked; mask frames beyond the last whole attention frame are left out.
        factor: mask frames per attention frame.
    """
    frames = masks.shape[-1] // factor
    masks = masks[..., : frames * factor].unflatten(-1, (frames, factor))
    return masks.mean(dim=(1, 3), dtype=torch.float32)


def window_bounds(frames: torch.Tensor, context: AttContext, style: str = 'regular'):
    """Return the first and the last attention frame that each frame attends to; int64, like ``frames``.

    They are not cut to the utterance: a side without a limit gets a bound far outside of any.

    Args:
        frames: indices of attention frames, int64.
        context: what limits them.
        style: ``regular``: left frames before to right frames after; ``chunked_limited``: the frame's own chunk of
            right + 1 frames and left // (right + 1) chunks before it.

    Raises:
        ValueError: for another style.
    """
    if style not in STYLES:
        raise ValueError(f"att_context_style is {style!r}; windows are known for {STYLES}")
    left, right = context
    first, last = frames, frames + right
    if style == 'chunked_limited' and right != UNLIMITED:
        first = frames - frames % (right + 1)
        last, left = first + right, left // (right + 1) * (right + 1)
    first = torch.full_like(frames, -FAR) if context.left == UNLIMITED else first - left
    return first, torch.full_like(frames, FAR) if right == UNLIMITED else last


def unanswerable_frames(
    share: torch.Tensor,
    left: int,
    threshold: float = MASK_THRESHOLD,
    right: int = 0,
    style: str = 'regular',
    lengths: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Return which attention frames are masked without another, wholly unmasked frame in their window, [B, A] bool.

    Args:
        share: masked share of each attention frame, [B, A].
        left: left context in attention frames; -1 = unlimited.
        threshold: share above which a frame counts as masked.
        right: right context; -1 = unlimited.
        style: of the window, see :func:`window_bounds`.
        lengths: whole attention frames of each utterance [B]; what comes after them answers nothing. None: all.
    """
    frames = share.shape[1]
    index = torch.arange(frames, device=share.device)
    clean = share == 0
    if lengths is not None:
        clean = clean & (index < lengths.to(share.device).unsqueeze(1))
    first, last = window_bounds(index, AttContext(left, right), style)
    clean_before = torch.nn.functional.pad(clean.cumsum(dim=1), (1, 0))  # [B, A + 1]: in frames 0 ... a - 1
    seen = clean_before[:, (last + 1).clamp(max=frames)] > clean_before[:, first.clamp(min=0)]
    return (share > threshold) & ~seen
