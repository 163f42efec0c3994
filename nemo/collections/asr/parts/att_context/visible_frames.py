# SPDX-License-Identifier: Apache-2.0
"""Which frames masking keeps visible, and which masked frames have none, in a window or the stack.

A frame is visible if none of its mask frames is masked.

Shapes: B batch, D features, T mask frames, A attention frames (T // factor).
"""

import inspect
from typing import Any

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED
from nemo.collections.asr.parts.att_context.windows import Window

MASK_THRESHOLD = 0.8  # an attention frame counts as masked above this share, as in NeMo's MLMLoss


def masked_share_per_frame(masks: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the masked share of whole attention frames, [B, A] float32, of masks [B, D, T] or [B, T]."""
    masks = masks.unsqueeze(1) if masks.dim() == 2 else masks
    frames = masks.shape[-1] // factor
    masks = masks[..., : frames * factor].unflatten(-1, (frames, factor))
    return masks.mean(dim=(1, 3), dtype=torch.float32)


def no_visible_frame(
    share: torch.Tensor, window: Window, threshold: float = MASK_THRESHOLD, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Return which attention frames are masked and have no visible frame in a window, [B, A] bool.

    Args:
        share: masked share of each attention frame, [B, A]; above the threshold a frame counts as masked.
        lengths: whole attention frames of each utterance [B]; frames after them are not visible. None: all.
    """
    frames = share.shape[1]
    index = torch.arange(frames, device=share.device)
    visible = share == 0
    if lengths is not None:
        visible = visible & (index < lengths.to(share.device).unsqueeze(1))
    first, last = window.bounds(index)
    before = torch.nn.functional.pad(visible.cumsum(dim=1), (1, 0))  # [B, A + 1]: in frames 0 ... a - 1
    seen = before[:, (last + 1).clamp(max=frames)] > before[:, first.clamp(min=0)]
    return (share > threshold) & ~seen


def kept_visible_frames(window: Window, index: torch.Tensor, ends: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """Return attention frames to keep visible, so that each frame has one in its window; [B, A] bool.

    It is one in as many frames as the window, limited on one side at least, holds, and one more at either end of an
    utterance that cuts a window off.

    Args:
        index: the frames' positions in the utterances, [A].
        ends: attention frames of each utterance, [B, 1].
        phase: from 0 to 1, exclusive, [B, 1] float: where the first kept frame is.
    """
    ends = ends.clamp(min=1)
    if window.has_chunks:
        return _one_in_a_window_of_chunks(window, index, ends, phase)
    left, right = window.context
    if left == UNLIMITED:  # all later frames see the first
        return index == _scaled(phase, torch.minimum(ends, torch.full_like(ends, right + 1)))
    if right == UNLIMITED:  # all earlier frames see the last
        return index == ends - 1 - _scaled(phase, torch.minimum(ends, torch.full_like(ends, left + 1)))
    period = left + 1 + right
    first = _scaled(phase, period)
    kept = index % period == first
    if right == 0:  # an utterance cuts windows off at its start only
        return kept | (index == 0)
    begins_late = first > (ends - 1).clamp(max=right)
    ends_early = torch.where(first < ends, (ends - 1 - first) % period, ends - 1) > left
    return kept | (begins_late & (index == 0)) | (ends_early & (index == ends - 1))


def _one_in_a_window_of_chunks(
    window: Window, index: torch.Tensor, ends: torch.Tensor, phase: torch.Tensor
) -> torch.Tensor:
    """A frame of the first chunk and of every n-th, by window; in a last, short chunk the last frame."""
    chunk, left = window.chunk, window.context.left
    chunks = index.div(chunk, rounding_mode='floor')
    period = 1 if left == UNLIMITED else left // chunk + 1
    first = _scaled(phase, period * chunk)
    has_one = chunks == 0
    if left != UNLIMITED:
        has_one = has_one | ((chunks - first // chunk) % period == 0)
    return has_one & (index == torch.minimum(chunks * chunk + first % chunk, ends - 1))


def _scaled(phase: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Return a whole number from 0 to count - 1, int32, for a phase from 0 to 1."""
    return (phase * count).to(torch.int32)


def takes(masking: Any, argument: str) -> bool:
    """Return whether the ``forward`` of a masking module takes an argument, or any."""
    parameters = inspect.signature(type(masking).forward).parameters.values()
    return any(parameter.name == argument or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def follows_context(masking: Any) -> bool:
    """Return whether a masking module uses the attention's window, or takes ``effective_left_context``."""
    return hasattr(masking, 'attention_window') or takes(masking, 'effective_left_context')


def window_of_masking(masking: Any, window: Window | None) -> dict[str, Any]:
    """Return a masking module's arguments to mask within a window (None: not known), or its left side."""
    if hasattr(masking, 'within') and takes(masking, 'effective_window'):
        return {'effective_window': masking.within(window)}
    if window is None or not takes(masking, 'effective_left_context'):
        return {}
    return {'effective_left_context': None if window.context.left == UNLIMITED else window.context.left}
