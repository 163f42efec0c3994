# SPDX-License-Identifier: Apache-2.0
"""Keep samples and gradients that are no numbers away from the weights. New in this project.

Shapes: B utterances, N samples.
"""

import copy
import dataclasses
import os
from collections.abc import Iterator

import torch

from nemo.collections.asr.parts.utils.logged_numbers import numbers_on_the_host
from nemo.utils import logging

LARGEST_SAMPLE = 1e15  # the power of a louder frame overflows float32, and with it the features
MAX_SKIPPED_IN_A_ROW = 100


def on_this_rank() -> str:
    """Return `` on rank 1`` or the like, to stand in a message; '' where there is one process only.

    In a worker of a data loader it is the rank of its training process, which torchrun and Lightning also leave in the
    environment.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    else:
        ranks, rank = int(os.environ.get('WORLD_SIZE', 1)), os.environ.get('RANK', '0')
    return f' on rank {rank}' if ranks > 1 else ''


def samples_are_sound(samples: torch.Tensor) -> bool:
    """Whether all samples are numbers that features can be computed of; one pass, and a wait if on a device."""
    if samples.numel() == 0:
        return True
    lowest, highest = torch.aminmax(samples)
    return bool((lowest >= -LARGEST_SAMPLE) & (highest <= LARGEST_SAMPLE))  # False for NaN


class NonFiniteGuard:
    """Mixin for the SSL models: no step is taken on what is not a number.

    ``model.skip_nan_grad`` (the key that NeMo's ASR models have): absent or false, the first such batch or gradient is
    an error; true, unsound utterances are dropped from their batch, steps whose gradients are not all finite are
    skipped (no weight, moment or decay changes), and both are counted as ``skipped_utterances`` and ``skipped_steps``.
    What ``train_ds.skip_bad_audio`` left out counts as ``skipped_utterances``, too.

    Batches are looked at on the CPU, before they go to the device. Gradients are looked at after the backward pass,
    which costs one wait for the device in each step; with a gradient scaler (16-mixed), which skips such steps itself,
    they are left to it.
    """

    _skipped_utterances = 0
    _skipped_steps = 0
    _skipped_in_a_row = 0

    def on_before_batch_transfer(self, batch, dataloader_idx):
        """Refuse an empty batch, and refuse or drop unsound utterances."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        self._skipped_utterances += getattr(batch, 'skipped', 0)
        unsound = unsound_utterances(batch)
        if unsound is None:
            return batch
        names = _names(batch, unsound)
        if not self._skips_nonfinite():
            raise ValueError(
                f"utterance {names} of a batch{on_this_rank()} has samples that are NaN, infinite or beyond {LARGEST_SAMPLE:g}; "
                "with model.skip_nan_grad: true it would be dropped"
            )
        if unsound.all():
            raise ValueError(
                f"no utterance of a batch{on_this_rank()} is sound: {names} have samples that are NaN or infinite"
            )
        logging.warning(f"Dropped utterance {names} of a batch{on_this_rank()}: its samples are NaN or infinite")
        self._skipped_utterances += int(unsound.sum())
        return _select(batch, ~unsound)

    def on_before_optimizer_step(self, optimizer) -> None:
        """Refuse or skip a step whose gradients are not all finite."""
        super().on_before_optimizer_step(optimizer)
        if getattr(self.trainer.precision_plugin, 'scaler', None) is not None:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
        if gradients_are_finite(parameters):
            self._skipped_in_a_row = 0
        else:
            self._skip_step(parameters)
        if self._skips_nonfinite() or (self.cfg.get('train_ds') or {}).get('skip_bad_audio'):
            counts = {'skipped_steps': self._skipped_steps, 'skipped_utterances': self._skipped_utterances}
            for name, count in numbers_on_the_host(counts).items():
                self.log(name, count)

    def _skip_step(self, parameters) -> None:
        where = f"the gradients of step {self.trainer.global_step} are not all finite"
        if not self._skips_nonfinite():
            raise FloatingPointError(
                f"{where}; the weights are as before it. With model.skip_nan_grad: true the step would be skipped"
            )
        for parameter in parameters:
            parameter.grad = None  # optimizers pass over such parameters, weight decay included
        self._skipped_steps += 1
        self._skipped_in_a_row += 1
        logging.warning(f"Skipped a step: {where} ({self._skipped_steps} skipped so far)")
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(f"{where}, nor were those of the {MAX_SKIPPED_IN_A_ROW - 1} steps before it")

    def _skips_nonfinite(self) -> bool:
        return bool(self.cfg.get('skip_nan_grad', False))


def gradients_are_finite(parameters) -> bool:
    """Whether all gradients are finite on all ranks, in one pass over them and one wait for the device.

    Gradients without a finite norm count as infinite: an optimizer that squares them would overflow, too.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return True
    norm = torch.nn.utils.get_total_norm(gradients)  # of the norms the fastest: 50 x the largest value's on a CPU
    if hasattr(norm, 'full_tensor'):  # sharded parameters
        norm = norm.full_tensor()
    is_finite = torch.isfinite(norm).float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(is_finite, op=torch.distributed.ReduceOp.MIN)  # all skip, or none
    return bool(is_finite)


def unsound_utterances(batch) -> torch.Tensor | None:
    """Return which utterances [B] of a batch have unsound samples, None if none has.

    Tensors on a device are passed over, for looking at them means to wait.

    Raises:
        ValueError: if the batch is empty.
    """
    unsound = None
    for name, samples in _signals(batch):
        if samples.numel() == 0:
            raise ValueError(f"a batch{on_this_rank()} is empty: {name} has the shape {list(samples.shape)}")
        if not samples_are_sound(samples):
            rows = ~(samples.flatten(1).abs() <= LARGEST_SAMPLE).all(dim=1)
            unsound = rows if unsound is None else unsound | rows
    return unsound


def _signals(batch) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in _fields(batch):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1 and not value.is_cuda:
            yield name, value


def _fields(batch) -> list[tuple[str, object]]:
    if dataclasses.is_dataclass(batch):
        return [(field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch)]
    if isinstance(batch, (tuple, list)):
        return [(f'item {index}', value) for index, value in enumerate(batch)]
    return []


def _names(batch, rows: torch.Tensor) -> str:
    positions = rows.nonzero().flatten().tolist()
    names = getattr(batch, 'sample_id', None)
    return ', '.join(str(position if names is None else names[position]) for position in positions)


def _select(batch, rows: torch.Tensor):
    """Return the batch with some of its utterances; whatever else it carries stays."""
    count = len(rows)

    def select(value):
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == count:
            return value[rows.to(value.device)]
        if isinstance(value, list) and len(value) == count:
            return [item for item, kept in zip(value, rows.tolist()) if kept]
        return value

    if dataclasses.is_dataclass(batch):
        selected = copy.copy(batch)
        for name, value in _fields(batch):
            setattr(selected, name, select(value))
        return selected
    selected = type(batch)(select(value) for value in batch)
    if hasattr(batch, '__dict__'):
        selected.__dict__.update(batch.__dict__)
    return selected
