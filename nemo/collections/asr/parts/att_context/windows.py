# SPDX-License-Identifier: Apache-2.0
"""Which attention frames see which others, by attention style."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, tightest

STYLES = ('regular', 'chunked_limited')  # the attention styles whose windows are known
FAR = 1 << 40  # attention frames, more than any utterance has


@dataclass(frozen=True)
class Window:
    """What each attention frame sees, in a context and one of two styles; ValueError for others.

    ``regular``: from ``left`` frames before to ``right`` frames after the frame. ``chunked_limited``: the frame's own
    chunk of right + 1 frames, and the left // (right + 1) chunks before it; without a limit on the right there are no
    chunks, and the left side is that of ``regular``.
    """

    context: AttContext
    style: str = 'regular'

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"att_context_style is {self.style!r}; windows are known for {STYLES}")

    @property
    def chunk(self) -> int:
        """How many frames share one window; 1 where each frame has its own."""
        return self.context.right + 1 if self.has_chunks else 1

    @property
    def has_chunks(self) -> bool:
        """Whether windows are made of whole chunks."""
        return self.style == 'chunked_limited' and self.context.right != UNLIMITED

    @property
    def frames(self) -> int:
        """How many frames a frame sees."""
        first, last = self.bounds(0)
        return last - first + 1

    @property
    def sees_other_frames(self) -> bool:
        """Whether a frame sees any frame but itself."""
        return self.context.left != 0 or self.context.right != 0

    def bounds(self, frame: Any) -> tuple[Any, Any]:
        """Return the first and last frame that a frame (int or int64 tensor) sees, in the utterance or not."""
        left, right = self.in_whole_chunks().context
        frame = frame - frame % self.chunk
        return frame - (FAR if left == UNLIMITED else left), frame + (FAR if right == UNLIMITED else right)

    def sees(self, query: Any, key: Any) -> Any:
        """Return whether frame ``query`` sees frame ``key``; ints, or int64 tensors that broadcast."""
        first, last = self.bounds(query)
        return (first <= key) & (key <= last)

    def in_whole_chunks(self) -> 'Window':
        """Return the window with its left side rounded down to whole chunks."""
        left, right = self.context
        return Window(AttContext(max(left // self.chunk * self.chunk, UNLIMITED), right), self.style)

    def intersect(self, own: AttContext, where: str) -> 'Window':
        """Return the window of what both this one and a narrower context show.

        -1 narrows nothing on its side.

        Raises:
            ValueError: beginning with ``where``, if no window of this style shows exactly what both show: under
                ``chunked_limited`` the left context must be whole chunks, and smaller chunks must be within larger.
        """
        both = self.context.intersect(own)
        if self.style == 'chunked_limited' and own != AttContext(UNLIMITED, UNLIMITED):
            _check_whole_chunks(self.context, own, both, where)
        return Window(both, self.style)


def tightest_window(windows: Iterable[Window]) -> Window:
    """Return a window within each of several, the widest such in most cases.

    Windows that show a frame nothing but itself are left out, unless all are such; so is the look-ahead of mixed styles.
    Where the others have no further frame in common, it is the smallest of them.
    """
    windows = list(windows)
    windows = [window for window in windows if window.sees_other_frames] or windows
    left = tightest(*(window.context.left for window in windows))
    if len({window.style for window in windows}) > 1:
        return Window(AttContext(left, 0))
    chunks = [window.chunk for window in windows if window.has_chunks]
    right = math.gcd(*chunks) - 1 if chunks else tightest(*(window.context.right for window in windows))
    common = Window(AttContext(left, right), windows[0].style)
    return common if common.sees_other_frames else min(windows, key=lambda window: window.frames)


def tightest_window_of(encoder: Any) -> Window | None:
    """Return what the tightest layer of any encoder with NeMo's attributes sees; None if not known."""
    style = getattr(encoder, 'att_context_style', 'regular')
    if style not in STYLES:
        return None
    if hasattr(encoder, 'tightest_window'):
        return encoder.tightest_window()
    try:
        return Window(AttContext.parse(list(encoder.att_context_size)), style)
    except (AttributeError, TypeError, ValueError):
        return None


def _check_whole_chunks(batch: AttContext, own: AttContext, both: AttContext, where: str) -> None:
    chunk, own_chunk = batch.right + 1, both.right + 1  # 0: there are no chunks, the right context is unlimited
    if both.right != batch.right and (chunk % own_chunk if chunk else batch.left != UNLIMITED):
        raise ValueError(
            f"{where}: the right context is {own.right}; with att_context_style chunked_limited and att_context_size "
            f"{batch.as_list()} it must be -1 (the batch's), {batch.right}, or one less than a divisor of the chunk, "
            f"{chunk} frames"
        )
    for left, frames in ((own.left, chunk), (both.left, own_chunk)):
        if frames and left > 0 and left % frames:
            raise ValueError(
                f"{where}: the left context is {left}; with att_context_style chunked_limited it must be a multiple of "
                f"the chunk, {frames} frames (right context + 1) in att_context_size {batch.as_list()}"
            )
