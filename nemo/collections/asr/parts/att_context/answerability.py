# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Which masked attention frames the attention can answer.

Shapes: B batch, D features, T mask frames, A attention frames (T // factor).
"""

import torch

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


def unanswerable_frames(share: torch.Tensor, left: int, threshold: float = MASK_THRESHOLD) -> torch.Tensor:
    """Return which attention frames are masked without another, wholly unmasked frame in their window, [B, A] bool.

    Args:
        share: masked share of each attention frame, [B, A].
        left: left context in attention frames; the window of frame t is t - left ... t. -1 = unlimited.
        threshold: share above which a frame counts as masked.
    """
    index = torch.arange(share.shape[1], device=share.device).expand_as(share)
    never = -share.shape[1] - max(left, 0) - 1
    last_clean = torch.where(share == 0, index, never).cummax(dim=1).values if share.shape[1] else index
    seen = last_clean >= (0 if left < 0 else index - left)
    return (share > threshold) & ~seen
