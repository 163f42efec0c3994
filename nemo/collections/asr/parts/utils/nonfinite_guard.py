# SPDX-License-Identifier: Apache-2.0
"""Keep non-finite samples and gradients away from the weights.

Shapes: B utterances, N samples.
"""

import copy
import dataclasses
import math
import os
from typing import Any

import torch

from nemo.collections.asr.parts.utils.logged_numbers import cpu_scalars
from nemo.utils import logging
from nemo.utils.left_out import LEFT_OUT

LARGEST_SAMPLE = 1e15  # the power of a louder frame overflows float32, and with it the features
MAX_SKIPPED_IN_A_ROW = 100
NOT_FINITE = 'samples that are NaN or infinite'


def on_this_rank() -> str:
    """Return `` on rank 1`` or the like, for messages, in data workers too; '' for a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    else:  # in a worker: what torchrun and Lightning leave in the environment
        ranks, rank = int(os.environ.get('WORLD_SIZE', 1)), os.environ.get('RANK', '0')
    return f' on rank {rank}' if ranks > 1 else ''


def samples_are_valid(samples: torch.Tensor) -> bool:
    """Return whether features can be computed of all samples; one pass; synchronises a device."""
    if samples.numel() == 0:
        return True
    lowest, highest = torch.aminmax(samples)
    return bool((lowest >= -LARGEST_SAMPLE) & (highest <= LARGEST_SAMPLE))  # False for NaN


def fault_of(samples: torch.Tensor) -> str | None:
    """Return what is wrong with the samples of a file, None: nothing; synchronises a device."""
    if not samples.numel():
        return 'there are no samples in it'
    return None if samples_are_valid(samples) else NOT_FINITE


class NonFiniteGuard:
    """Mixin for the SSL models: no step is taken on non-finite samples or gradients.

    ``model.skip_nan_grad`` (the key that NeMo's ASR models have): absent or false, the first such batch or gradient is
    an error; true, invalid utterances are dropped from their batch, steps whose gradients are not all finite are
    skipped (no weight, moment or decay changes), and both are counted. Where a rank's batch has no valid utterance, the
    step is skipped on all ranks. What ``train_ds.skip_bad_audio`` left out is counted, too.

    The norm of the gradients is computed once in each step, which synchronises host and device: it is checked, logged
    as ``gradient_norm``, and used to clip. A gradient scaler (16-mixed) skips such steps itself.
    """

    _skipped_utterances = 0
    _skipped_steps = 0
    _skipped_in_a_row = 0
    _gradient_norm = 0.0
    _batch_is_invalid = False

    def on_before_batch_transfer(self, batch, dataloader_idx):
        """Refuse an empty batch, and refuse or drop invalid utterances."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        self._skipped_utterances += getattr(batch, 'skipped', 0)
        invalid = None if getattr(batch, 'samples_are_checked', False) else invalid_utterances(batch)
        self._batch_is_invalid = invalid is not None and bool(invalid.all())
        if invalid is None:
            return batch
        rows = invalid.nonzero().flatten().tolist()
        names = getattr(batch, 'sample_id', None) or range(len(invalid))
        what = f"utterance {', '.join(str(names[row]) for row in rows)} of a batch{on_this_rank()}"
        why = f"samples that are NaN, infinite or beyond {LARGEST_SAMPLE:g}"
        if not self.cfg.get('skip_nan_grad'):
            raise ValueError(f"{what} has {why}; with model.skip_nan_grad: true it would be dropped")
        if self._batch_is_invalid and not self.training:
            raise ValueError(f"{what} has {why}, and the batch no valid utterance")
        logging.warning(f"Dropped {what}: it has {why}")
        self._skipped_utterances += len(rows)
        LEFT_OUT.add(NOT_FINITE, what, len(rows))
        if not self._batch_is_invalid:
            return _select(batch, ~invalid)
        batch = _select(batch, torch.arange(len(invalid)) == 0)  # silence, for ranks that wait for this one
        for samples in _signals(batch).values():
            samples.zero_()
        return batch

    def loss_of_valid(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a training step's loss: without a valid utterance NaN, and so all ranks' gradients."""
        return loss * float('nan') if self._batch_is_invalid else loss

    def on_before_optimizer_step(self, optimizer) -> None:
        """Refuse or skip a step whose gradients are not all finite, and log their norm."""
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        self._gradient_norm = gradient_norm(parameters_of(optimizer))
        if math.isfinite(self._gradient_norm):
            self._skipped_in_a_row = 0
        elif getattr(self.trainer.precision_plugin, 'scaler', None) is None:
            self._skip_step(optimizer)
        logs = {'gradient_norm': self._gradient_norm}
        if self._logs_skipped():
            logs['skipped_steps'] = self._skipped_steps  # of all ranks alike; the utterances are summed over ranks
        self.log_dict(cpu_scalars(logs))

    def _skip_step(self, optimizer) -> None:
        where = f"the gradients of step {self.trainer.global_step} are not all finite"
        if not self.cfg.get('skip_nan_grad'):
            raise FloatingPointError(
                f"{where}; the weights are as before it. With model.skip_nan_grad: true the step would be skipped"
            )
        optimizer.zero_grad(set_to_none=True)  # it leaves such parameters as they are, weight decay included
        self._skipped_steps += 1
        self._skipped_in_a_row += 1
        logging.warning(f"Skipped a step: {where} ({self._skipped_steps} skipped so far)")
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(f"{where}, nor were those of the {MAX_SKIPPED_IN_A_ROW - 1} steps before it")

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by the norm that is known already, or as Lightning does by value."""
        if not gradient_clip_val or gradient_clip_algorithm == 'value':
            clip = super().configure_gradient_clipping  # type: ignore[misc]
            clip(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self._gradient_norm > gradient_clip_val:
            gradients = [weight.grad for weight in parameters_of(optimizer) if weight.grad is not None]
            torch._foreach_mul_(gradients, gradient_clip_val / (self._gradient_norm + 1e-6))  # as clip_grad_norm_

    def _logs_skipped(self) -> bool:
        return bool(self.cfg.get('skip_nan_grad') or (self.cfg.get('train_ds') or {}).get('skip_bad_audio'))


def parameters_of(optimizer) -> list[torch.nn.Parameter]:
    """Return what an optimizer trains, of all its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group['params']]


def gradient_norm(parameters) -> float:
    """Return the norm of all gradients, the same on every rank, with one host-device synchronisation."""
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    return float(norm.full_tensor() if hasattr(norm, 'full_tensor') else norm)


def invalid_utterances(batch) -> torch.Tensor | None:
    """Return the invalid utterances [B], or None; ValueError for an empty batch. No synchronisation."""
    invalid = None
    for name, samples in _signals(batch).items():
        if samples.numel() == 0:
            raise ValueError(f"a batch{on_this_rank()} is empty: {name} has the shape {list(samples.shape)}")
        if not samples_are_valid(samples):
            rows = ~(samples.flatten(1).abs() <= LARGEST_SAMPLE).all(dim=1)
            invalid = rows if invalid is None else invalid | rows
    return invalid


def _signals(batch) -> dict[str, torch.Tensor]:
    is_signal = lambda value: isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
    return {name: value for name, value in _fields(batch).items() if is_signal(value) and not value.is_cuda}


def _fields(batch) -> dict[str, Any]:
    if dataclasses.is_dataclass(batch):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    items = batch if isinstance(batch, (tuple, list)) else ()
    return {f'item {index}': value for index, value in enumerate(items)}


def _select(batch, rows: torch.Tensor):
    """Return the batch with some of its utterances; whatever else it carries stays."""

    def select(value):
        if isinstance(value, torch.Tensor) and value.shape[:1] == rows.shape:
            return value[rows.to(value.device)]
        if isinstance(value, list) and len(value) == len(rows):
            return [item for item, kept in zip(value, rows.tolist()) if kept]
        return value

    selected = {name: select(value) for name, value in _fields(batch).items()}
    is_dataclass = dataclasses.is_dataclass(batch)
    found: Any = copy.copy(batch) if is_dataclass else type(batch)(selected.values())
    if hasattr(found, '__dict__'):
        found.__dict__.update(selected if is_dataclass else batch.__dict__)
    return found
