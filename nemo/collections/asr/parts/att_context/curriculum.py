# SPDX-License-Identifier: Apache-2.0
"""A ceiling on the batches' contexts that moves as training goes on."""

import math

import lightning.pytorch as pl
import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, tightest
from nemo.collections.asr.parts.att_context.masking_context import follow_left_context, followed_left_context
from nemo.collections.asr.parts.att_context.schedule import ContextSchedule


class AttContextCurriculum(pl.Callback):
    """Narrow the context of every training batch to a ceiling, which is a function of the global step and of no more.

    So a run that is resumed, in the middle of a milestone too, goes on as if it had never stopped. While training,
    ``model.mask_processor.left_context_size`` is the tightest of the ceiling, the layers' own contexts and what is
    configured there. Validation runs in the configured default context, with the configured masking, and nothing is left behind after training.

    Either milestones, of which the last at or below the step holds::

        AttContextCurriculum(milestones=[[0, [40, 0]], [50000, [160, 0]], [150000, [320, 0]]])

    or a linear path from one context to another::

        AttContextCurriculum(start=[40, 0], end=[320, 0], warmup_steps=150000)

    Args:
        milestones: pairs of a global step and a ceiling [left, right] in attention frames; before the first there is
            none.
        interpolate: ``step``, or ``linear`` for a straight path between milestones. Left contexts are rounded down to
            what the attention style allows; under an ``att_context_sampler`` to whole chunks of what it draws, and
            a chunk larger than the ceiling's right context + 1 is cut to that.
        start: the ceiling at step 0.
        end: the ceiling from ``warmup_steps`` on.
        warmup_steps: steps from ``start`` to ``end``.

    Raises:
        ValueError: naming the argument, the item and what is allowed.
    """

    def __init__(self, milestones=None, interpolate: str = 'step', start=None, end=None, warmup_steps=None):
        path = {'start': start, 'end': end, 'warmup_steps': warmup_steps}
        missing = [name for name, value in path.items() if value is None]
        if (milestones is None) == (len(missing) == len(path)) or (milestones is None and missing):
            raise ValueError(
                f"curriculum takes either milestones or all of {', '.join(path)}; milestones is {milestones!r}, "
                + ', '.join(f'{name} is {value!r}' for name, value in path.items())
            )
        self._field = 'curriculum.milestones'
        if milestones is None:
            self._field = 'curriculum: the path [[0, start], [warmup_steps, end]]'
            milestones, interpolate = [[0, start], [warmup_steps, end]], 'linear'
        self.schedule = ContextSchedule.parse(milestones, self._field, 'step', interpolate=interpolate)
        self._masking_before: int | None = None

    def ceiling_at(self, step: int, encoder) -> AttContext | None:
        """Return the ceiling at a global step, None if there is none yet."""
        chunks = []
        drawn = getattr(encoder, 'att_context_sampler', None) is not None  # it rounds to whatever chunk it draws
        if encoder.att_context_style == 'chunked_limited' and not drawn:
            chunks = [right + 1 for _, right in encoder.att_context_size_all if right != UNLIMITED]
        return self.schedule.at(step, math.lcm(*chunks))

    def on_fit_start(self, trainer, pl_module) -> None:
        """Check, before training, that the encoder can follow every ceiling."""
        encoder = getattr(pl_module, 'encoder', None)
        if not hasattr(encoder, 'check_att_context_ceiling'):
            raise ValueError(
                f"curriculum: {type(pl_module).__name__} has no encoder with a context ceiling; it needs this "
                "project's ConformerEncoder"
            )
        for index, (_, ceiling) in enumerate(self.schedule.anchors):
            encoder.check_att_context_ceiling(ceiling, f'{self._field}: item {index}, {ceiling.as_list()}')

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Set the ceiling of the coming batch."""
        encoder = pl_module.encoder
        encoder.att_context_ceiling = ceiling = self.ceiling_at(trainer.global_step, encoder)
        left = UNLIMITED if ceiling is None else ceiling.left
        own = [context.left for context in encoder.layer_att_contexts() if context is not None]
        self._set_masking(pl_module, tightest(left, *own))
        pl_module.log('att_context_ceiling_left', torch.tensor(float(left)))  # a number would go to the device

    def on_validation_start(self, trainer, pl_module) -> None:
        """Validate with the configured masking; the encoder follows a ceiling only in training."""
        self._restore_masking(pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        """Leave the model as it was configured."""
        self._restore(pl_module)

    def on_exception(self, trainer, pl_module, exception) -> None:
        """Leave the model as it was configured."""
        self._restore(pl_module)

    def _restore(self, pl_module) -> None:
        self._restore_masking(pl_module)
        if hasattr(getattr(pl_module, 'encoder', None), 'att_context_ceiling'):
            pl_module.encoder.att_context_ceiling = None

    def _set_masking(self, pl_module, left: int) -> None:
        masking = getattr(pl_module, 'mask_processor', None)
        if hasattr(masking, 'left_context_size'):
            if self._masking_before is None:
                self._masking_before = followed_left_context(masking)
            follow_left_context(masking, left)

    def _restore_masking(self, pl_module) -> None:
        if self._masking_before is not None:
            follow_left_context(pl_module.mask_processor, self._masking_before)
            self._masking_before = None
