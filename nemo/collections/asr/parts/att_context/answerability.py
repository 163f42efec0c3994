# SPDX-License-Identifier: Apache-2.0
"""Which masked attention frames the attention can answer.

Shapes: B batch, D features, T mask frames, A attention frames (T // factor).
"""

import torch

from nemo.collections.asr.parts.att_context.windows import Window

MASK_THRESHOLD = 0.8  # an attention frame counts as masked above this share, as in NeMo's MLMLoss


def masked_share_per_frame(masks: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the share of each attention frame that is masked, [B, A] float32.

    Args:
        masks: [B, D, T] or [B, T], 1 or True where masked; mask frames beyond the last whole attention frame are
            left out.
        factor: mask frames per attention frame.
    """
    masks = masks.unsqueeze(1) if masks.dim() == 2 else masks
    frames = masks.shape[-1] // factor
    masks = masks[..., : frames * factor].unflatten(-1, (frames, factor))
    return masks.mean(dim=(1, 3), dtype=torch.float32)


def unanswerable_frames(
    share: torch.Tensor, window: Window, threshold: float = MASK_THRESHOLD, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Return which attention frames are masked without another, wholly unmasked frame in their window, [B, A] bool.

    Args:
        share: masked share of each attention frame, [B, A].
        window: which frames a frame sees.
        threshold: share above which a frame counts as masked.
        lengths: whole attention frames of each utterance [B]; what comes after them answers nothing. None: all.
    """
    frames = share.shape[1]
    index = torch.arange(frames, device=share.device)
    clean = share == 0
    if lengths is not None:
        clean = clean & (index < lengths.to(share.device).unsqueeze(1))
    first, last = window.bounds(index)
    clean_before = torch.nn.functional.pad(clean.cumsum(dim=1), (1, 0))  # [B, A + 1]: in frames 0 ... a - 1
    seen = clean_before[:, (last + 1).clamp(max=frames)] > clean_before[:, first.clamp(min=0)]
    return (share > threshold) & ~seen
