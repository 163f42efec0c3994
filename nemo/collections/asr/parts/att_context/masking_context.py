# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""What a masking module is told of the attention's context, and whether it listens."""

import inspect
from typing import Optional

from nemo.collections.asr.parts.att_context.context import UNLIMITED, tightest


def follows_context(masking) -> bool:
    """Return whether a masking module takes ``effective_left_context`` and ``current_frame``.

    A ``forward`` that passes any keywords on is judged by the class that it inherits from; one that inherits from
    none with arguments by name is given them, and has to take them.
    """
    for cls in inspect.getmro(type(masking)):
        forward = cls.__dict__.get('forward')
        if forward is None:
            continue
        parameters = inspect.signature(forward).parameters
        if 'effective_left_context' in parameters:
            return True
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return True


def masking_left_context(attention_left: int, masking) -> int:
    """Return the left context to mask within, in attention frames, -1 = unlimited: the tightest that anybody asks for.

    Args:
        attention_left: what the tightest layer of the encoder sees of the past in this batch.
        masking: the masking module; its ``configured_left_context_size``, where it has one, is what the user
            configured, which no attention context widens.
    """
    return tightest(attention_left, getattr(masking, 'configured_left_context_size', UNLIMITED))


def followed_left_context(masking) -> Optional[int]:
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
