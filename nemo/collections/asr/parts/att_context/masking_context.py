# SPDX-License-Identifier: Apache-2.0
"""What a masking module is told of the attention's context, and whether it listens."""

import functools
import inspect

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, tightest
from nemo.collections.asr.parts.att_context.windows import Window


def follows_context(masking) -> bool:
    """Return whether a masking module takes ``effective_left_context`` and ``current_frame``."""
    return takes(masking, 'effective_left_context')


def takes(masking, argument: str) -> bool:
    """Return whether a masking module takes a keyword argument.

    A ``forward`` that passes any keywords on is judged by the class that it inherits from; one that inherits from
    none with arguments by name is given them, and has to take them.
    """
    return _class_takes(type(masking), argument)


@functools.cache  # it is asked in each step
def _class_takes(masking: type, argument: str) -> bool:
    for cls in inspect.getmro(masking):
        forward = cls.__dict__.get('forward')
        if forward is None or cls is torch.nn.Module:
            continue
        parameters = inspect.signature(forward).parameters
        if argument in parameters:
            return True
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return True


def window_arguments(masking, window: Window | None) -> dict:
    """Return the keyword arguments that tell a masking module what the attention sees; none where nothing limits it.

    ``effective_left_context`` is the tightest left context that anybody asks for: of the attention, and of what the
    user configured as ``masking.left_context_size``, which no attention context widens. A module that takes it gets
    ``effective_window``, too, where the attention looks ahead; others are to be answered from the past alone.

    Args:
        masking: a module for which :func:`follows_context` is true.
        window: what the tightest layer sees in this batch; None if that is not known.
    """
    if not getattr(masking, 'follow_context', True):
        return {}
    window = Window(AttContext(UNLIMITED, 0)) if window is None else window
    left = tightest(window.context.left, getattr(masking, 'configured_left_context_size', UNLIMITED))
    follows_less = getattr(masking, 'left_context_size', UNLIMITED) != UNLIMITED  # than there is now
    arguments = {'effective_left_context': None if left == UNLIMITED and not follows_less else left}
    looks_ahead = window.context.right != 0 and (left, window.context.right) != (UNLIMITED, UNLIMITED)
    if looks_ahead and takes(masking, 'effective_window'):
        arguments['effective_window'] = Window(AttContext(left, window.context.right), window.style)
    return arguments


def followed_left_context(masking) -> int | None:
    """Return the left context that a masking module was last told to follow; None for one that takes no context."""
    return getattr(masking, 'followed_left_context_size', getattr(masking, 'left_context_size', None))


def follow_left_context(masking, left: int) -> None:
    """Tell a masking module the attention's left context, for calls that do not name one.

    A module of this project keeps what the user configured beside it; of another one ``left_context_size`` is set.
    """
    if hasattr(masking, 'followed_left_context_size'):
        masking.followed_left_context_size = left
    else:
        masking.left_context_size = left
