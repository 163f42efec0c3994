# SPDX-License-Identifier: Apache-2.0
"""What an encoder must have for masking, models and reports to follow its attention context."""

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import STYLES, Window


@runtime_checkable
class FollowsContexts(Protocol):
    """An encoder whose context is decided for each batch before it runs; ``BatchContext`` brings most of it.

    A model pins one context for the whole step, and masking, loss and reports ask for it.
    """

    att_context_size: list[int]
    """The present context, ``[left, right]`` in attention frames, -1 = unlimited."""

    def att_context_of_batch(self, with_batch=None, step: int | None = None) -> AttContext:
        """Return the context that a batch has; see ``BatchContext.att_context_of_batch``."""

    def using_att_context_size(self, att_context_size) -> AbstractContextManager[AttContext]:
        """Pin a context for all forward passes inside."""

    def using_one_att_context_size(self) -> AbstractContextManager[AttContext]:
        """Keep the pinned context, or pin one."""

    def tightest_left_context(self) -> int:
        """Return the smallest limited left context of all layers, in attention frames; -1 if none is limited."""

    def tightest_window(self) -> Window:
        """Return a window that lies within what each layer sees in the present context."""


def tightest_window_of(encoder) -> Window | None:
    """Return what the tightest layer of an encoder sees at present; None if the encoder does not tell.

    An encoder that is no :class:`FollowsContexts` tells by NeMo's attributes: ``att_context_size``, one pair of
    numbers, and ``att_context_style``, which is ``regular`` where there is none.
    """
    if isinstance(encoder, FollowsContexts):
        return encoder.tightest_window()
    style = getattr(encoder, 'att_context_style', 'regular')
    if style not in STYLES:
        return None
    try:
        return Window(AttContext.parse(list(encoder.att_context_size)), style)
    except (AttributeError, TypeError, ValueError):
        return None


def why_context_is_unknown(encoder) -> str | None:
    """Return what an encoder lacks so that masking cannot follow it; None if it lacks nothing."""
    if tightest_window_of(encoder) is not None:
        return None
    found = getattr(encoder, 'att_context_size', 'missing')
    style = getattr(encoder, 'att_context_style', 'regular')
    if style not in STYLES:
        return f"its att_context_style is {style}, whose windows are not known (known are {STYLES})"
    return f"its att_context_size is {found}; it must be the present context, [left, right] in attention frames"
