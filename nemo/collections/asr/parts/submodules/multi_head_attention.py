# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Patch of NeMo's ``multi_head_attention.py``: the attention of each layer may have a context of its own."""

from typing import Callable, Optional

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class MultiHeadAttention(_up.MultiHeadAttention):
    """NeMo's multi-head attention with a context of its own, which the Conformer encoder it belongs to follows."""

    _att_context: Optional[AttContext] = None
    _take_att_context: Optional[Callable] = None  # the encoder's method that checks a new context and stores it

    @property
    def att_context(self) -> Optional[AttContext]:
        """The context of this layer, in attention frames; None: the batch's. See ``att_context_size``."""
        return self._att_context

    @property
    def att_context_size(self) -> Optional[list[int]]:
        """The context of this layer, ``[left, right]`` in attention frames, or None.

        The layer attends within the intersection of this and the batch's context; -1 narrows nothing on its side.

        Raises:
            ValueError: when set to what is no context, or one that the encoder's attention cannot follow.
        """
        return None if self._att_context is None else self._att_context.as_list()

    @att_context_size.setter
    def att_context_size(self, value) -> None:
        context = None if value is None else AttContext.parse(value, field='self_attention.att_context_size')
        if self._take_att_context is None:
            self._att_context = context
        else:
            self._take_att_context(self, context)


class RelPositionMultiHeadAttention(MultiHeadAttention, _up.RelPositionMultiHeadAttention):
    """NeMo's multi-head attention with relative positions, with a context of its own."""


class RelPositionMultiHeadAttentionLongformer(
    RelPositionMultiHeadAttention, _up.RelPositionMultiHeadAttentionLongformer
):
    """NeMo's local attention. Its context is built into it, and into the positional encoding all layers share."""

    @property
    def att_context_size(self) -> list[int]:
        """The context it was built with, ``[left, right]``.

        Raises:
            ValueError: when set to another.
        """
        return self._built_for

    @att_context_size.setter
    def att_context_size(self, value) -> None:
        built_for = self.__dict__.setdefault('_built_for', value)
        if value is None or list(value) != list(built_for):
            raise ValueError(
                f"self_attention.att_context_size cannot become {value!r}: self_attention_model rel_pos_local_attn "
                f"is built for {list(built_for)} in all layers; use rel_pos or abs_pos for contexts per layer"
            )
