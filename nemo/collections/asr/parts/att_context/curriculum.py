# SPDX-License-Identifier: Apache-2.0
"""A ceiling on the batches' contexts that moves during training."""

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.schedule import ContextSchedule


class AttContextCurriculum(pl.Callback):
    """Narrow the context of training batches to a ceiling, a function of the global step alone.

    Validation ignores the ceiling, and the end of training removes it. Either milestones, of which the last at or below
    the step holds, or a linear path from one context to another::

        AttContextCurriculum(milestones=[[0, [40, 0]], [50000, [160, 0]], [150000, [320, 0]]])
        AttContextCurriculum(start=[40, 0], end=[320, 0], warmup_steps=150000)

    Args:
        milestones: pairs of a global step and a ceiling [left, right] in attention frames.
        interpolate: ``step``, or ``linear`` for a straight path between milestones, rounded down to whole chunks.

    Raises:
        ValueError: naming the argument, the item and what is allowed.
    """

    def __init__(
        self,
        milestones: Any = None,
        interpolate: str = 'step',
        start: Any = None,
        end: Any = None,
        warmup_steps: Any = None,
    ):
        path = {'start': start, 'end': end, 'warmup_steps': warmup_steps}
        given = [value is not None for value in path.values()]
        if any(given) if milestones is not None else not all(given):
            raise ValueError(
                f"curriculum takes either milestones or all of {', '.join(path)}; milestones is {milestones!r}, "
                + ', '.join(f'{name} is {value!r}' for name, value in path.items())
            )
        self._field = 'curriculum.milestones'
        if milestones is None:
            self._field = 'curriculum: the path [[0, start], [warmup_steps, end]]'
            milestones, interpolate = [[0, start], [warmup_steps, end]], 'linear'
        self.schedule = ContextSchedule.parse(milestones, self._field, 'step', interpolate=interpolate)

    def ceiling_at(self, step: int, encoder: Any) -> AttContext | None:
        """Return the ceiling at a global step, None if there is none yet."""
        return self.schedule.at(step, encoder.att_context_policy.left_multiple)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check, before training, that the encoder supports every ceiling."""
        encoder: Any = getattr(pl_module, 'encoder', None)
        if not hasattr(encoder, 'att_context_policy'):
            raise ValueError(
                f"curriculum: {type(pl_module).__name__} has no encoder with a context policy; it needs this "
                "project's ConformerEncoder"
            )
        for index, (_, ceiling) in enumerate(self.schedule.anchors):
            encoder.check_att_context_ceiling(ceiling, f'{self._field}: item {index}, {ceiling.as_list()}')

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the ceiling of the coming batch."""
        ceiling = self.ceiling_at(trainer.global_step, pl_module.encoder)
        self._set_ceiling(pl_module, ceiling)
        left = UNLIMITED if ceiling is None else ceiling.left
        pl_module.log('att_context_ceiling_left', torch.tensor(float(left)))  # a number would go to the device

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException | None = None) -> None:
        """Remove the ceiling; after an exception, too."""
        self._set_ceiling(pl_module, None)

    on_exception = on_train_end

    @staticmethod
    def _set_ceiling(pl_module: Any, ceiling: AttContext | None) -> None:
        encoder: Any = getattr(pl_module, 'encoder', None)
        if hasattr(encoder, 'att_context_policy'):
            encoder.att_context_policy = replace(encoder.att_context_policy, ceiling=ceiling)
