# SPDX-License-Identifier: Apache-2.0
"""Guards: attention frames that masking spares, so that every frame sees one of them in its window.

Whatever else is masked, every masked frame can then be answered. There are as few guards as the window allows: one in
so many frames as the window holds, and one more at either end of an utterance where the window is cut off there.

Shapes: B batch, A attention frames.
"""

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED
from nemo.collections.asr.parts.att_context.windows import Window


def guard_frames(window: Window, index: torch.Tensor, ends: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """Return which attention frames are guards, [B, A] bool.

    Args:
        window: what each frame sees; limited on one side at least.
        index: the frames' positions in the utterances, [1, A] or [B, A].
        ends: attention frames of each utterance, [B, 1]; what comes after them answers nothing.
        phase: from 0 to 1, exclusive, [B, 1] float: where the first guard lies. Drawn at random, any frame may be one.
    """
    ends = ends.clamp(min=1)
    if window.has_chunks:
        return _one_in_a_window_of_chunks(window, index, ends, phase)
    left, right = window.context
    if left == UNLIMITED:  # all that come later see the first
        return index == _scaled(phase, torch.minimum(ends, torch.full_like(ends, right + 1)))
    if right == UNLIMITED:  # all that come before see the last
        return index == ends - 1 - _scaled(phase, torch.minimum(ends, torch.full_like(ends, left + 1)))
    period = left + 1 + right
    first = _scaled(phase, period)
    guards = (index - first) % period == 0
    begins_late = first > (ends - 1).clamp(max=right)
    ends_early = torch.where(first < ends, (ends - 1 - first) % period, ends - 1) > left
    return guards | (begins_late & (index == 0)) | (ends_early & (index == ends - 1))


def _one_in_a_window_of_chunks(window: Window, index, ends, phase) -> torch.Tensor:
    """One frame of the first chunk and of each (chunks of the window)-th; in a last, short chunk the last frame."""
    chunk, left = window.chunk, window.context.left
    chunks = index.div(chunk, rounding_mode='floor')
    if left == UNLIMITED:
        has_guard = chunks == 0
        place = _scaled(phase, chunk)
    else:
        period = left // chunk + 1
        first = _scaled(phase, period * chunk)
        has_guard = ((chunks - first // chunk) % period == 0) | (chunks == 0)
        place = first % chunk
    guard = torch.minimum(chunks * chunk + place, ends - 1)
    return has_guard & (index == guard)


def _scaled(phase: torch.Tensor, count) -> torch.Tensor:
    """Return a whole number from 0 to count - 1, int32, for a phase from 0 to 1."""
    return (phase * count).to(torch.int32)


def share_of_guards(window: Window) -> float:
    """Return which share of the frames of a long utterance are guards."""
    if UNLIMITED in window.context:
        return 0.0
    left, right = window.context
    return 1 / (left // window.chunk * window.chunk + 1 + right)
