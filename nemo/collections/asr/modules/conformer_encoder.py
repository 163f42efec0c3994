# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Patch of NeMo's ``conformer_encoder.py``: one attention context per batch, known before the encoder runs."""

from contextlib import contextmanager
from typing import Iterator, Optional

import torch

from nemo.collections.asr.parts.att_context.context import AttContext, draw_index, tightest
from nemo.core.classes.mixins import adapter_mixins
from nemo_streaming_ssl import upstream

_up = upstream(globals())

PROBABILITY_TOLERANCE = 1e-6


class ConformerEncoder(_up.ConformerEncoder):
    """NeMo's Conformer encoder with a context that can be drawn, pinned for a whole step, and asked for.

    Takes NeMo's arguments, and:

    Args:
        att_context_seed: seed of the draw among several ``att_context_size`` entries. The draw is a pure function of
            the seed and the step, hence the same on every rank and after a resume.
    """

    att_context_seed = 0
    _att_context_is_pinned = False
    _draws = 0  # steps counted by the encoder itself, where nobody passes one

    def __init__(self, *args, att_context_seed: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.att_context_seed = att_context_seed

    def draw_att_context_size(self, step: Optional[int] = None) -> AttContext:
        """Return the context for a batch, without setting it.

        In training with several contexts it is one of ``att_context_size_all``, drawn by ``att_context_probs``;
        otherwise the default, ``att_context_size``.

        Args:
            step: the training step; the draw is a pure function of ``att_context_seed`` and it. None takes the
                encoder's own count of such draws, which starts at 0 in each process.
        """
        if not (self.training and len(self.att_context_size_all) > 1):
            return self._as_context(self.att_context_size)
        if step is None:
            step, self._draws = self._draws, self._draws + 1
        index = draw_index(self.att_context_seed, step, self.att_context_probs)
        return self._as_context(self.att_context_size_all[index])

    @contextmanager
    def using_att_context_size(self, att_context_size) -> Iterator[AttContext]:
        """Pin the context: inside, ``att_context_size`` is this one and every forward uses exactly it.

        Args:
            att_context_size: an ``AttContext`` or anything that ``AttContext.parse`` reads.

        Raises:
            ValueError: if it is no context, or the encoder's attention cannot follow it.
        """
        context = self._as_context(att_context_size)
        self._check_can_attend_within(context)
        before = self.att_context_size, self._att_context_is_pinned
        self.att_context_size, self._att_context_is_pinned = list(context), True
        try:
            yield context
        finally:
            self.att_context_size, self._att_context_is_pinned = before

    @contextmanager
    def using_one_att_context_size(self) -> Iterator[AttContext]:
        """Keep the pinned context, or draw one (counting the step) and pin it: one context for all that is inside."""
        if self._att_context_is_pinned:
            yield self._as_context(self.att_context_size)
            return
        with self.using_att_context_size(self.draw_att_context_size()) as context:
            yield context

    def tightest_left_context(self) -> int:
        """The smallest limited left context, in attention frames, of the present context; -1 if unlimited."""
        return tightest(self.att_context_size[0])

    def forward_internal(self, *args, **kwargs):
        """Run the encoder within one context; arguments and results are NeMo's."""
        with self.using_one_att_context_size():
            return super().forward_internal(*args, **kwargs)

    def _create_masks(self, att_context_size, *args, **kwargs):
        # Stock's forward draws a context into a local variable and uses it for nothing but this call.
        if self._att_context_is_pinned:
            att_context_size = self.att_context_size
        return super()._create_masks(att_context_size, *args, **kwargs)

    def _calc_context_sizes(self, att_context_size, att_context_probs, **kwargs):
        if att_context_probs and abs(sum(att_context_probs) - 1) <= PROBABILITY_TOLERANCE:
            # Stock wants a sum of exactly 1, which ten times 0.1 misses.
            att_context_probs = list(att_context_probs)
            att_context_probs[-1] = 1 - sum(att_context_probs[:-1])
        return super()._calc_context_sizes(
            att_context_size=att_context_size, att_context_probs=att_context_probs, **kwargs
        )

    def _as_context(self, att_context_size):
        """Parse a context; the three numbers of ``chunked_limited_with_rc`` (NeMo 3.0) stay NeMo's list."""
        if self.att_context_style == 'chunked_limited_with_rc' and not isinstance(att_context_size, AttContext):
            return list(att_context_size)
        return AttContext.parse(att_context_size, field='encoder.att_context_size')

    def _check_can_attend_within(self, context) -> None:
        if self.self_attention_model == 'rel_pos_local_attn' and list(context) != list(self.att_context_size):
            raise ValueError(
                f"encoder.att_context_size cannot become {list(context)}: self_attention_model rel_pos_local_attn "
                f"builds {list(self.att_context_size)} into its layers; use change_attention_model"
            )
        if self.att_context_style == 'chunked_limited' and context.right >= 0 and context.left > 0:
            chunk = context.right + 1
            if context.left % chunk:
                raise ValueError(
                    f"encoder.att_context_size is {context.as_list()}: with att_context_style chunked_limited the "
                    f"left context must be a multiple of the chunk, {chunk} frames (right context + 1)"
                )


class ConformerEncoderAdapter(ConformerEncoder, _up.ConformerEncoderAdapter):
    """NeMo's adapter methods over the patched encoder."""


# NeMo registered its own pair under the same names when its module was loaded.
adapter_mixins.ADAPTER_REGISTRY.pop(f'{ConformerEncoder.__module__}.{ConformerEncoder.__name__}', None)
adapter_mixins.register_adapter(base_class=ConformerEncoder, adapter_class=ConformerEncoderAdapter)
