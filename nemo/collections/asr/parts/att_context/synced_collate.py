# SPDX-License-Identifier: Apache-2.0
"""Batches with their attention context, from the data loader to the training step.

A worker process can set nothing on the model, so the batch contains the context, and the policy that drew
it. A collate function counts batches; only the trainer has the number that all ranks share and that a resumed run
continues, its global step. So the model repeats the draw when a trainer gives it a batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from torch.utils.data import get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from nemo.collections.asr.parts.att_context.context import AttContext, is_distribution, is_sequence, shown
from nemo.collections.asr.parts.att_context.policy import ContextPolicy
from nemo.collections.asr.parts.att_context.schedule import parse_pair


def parse_policy(context_options: Any = None, context_probs: Any = None, seed: int = 0) -> ContextPolicy:
    """Read and check the arguments of :func:`create_synced_context_collate`."""
    if not is_sequence(context_options) or not len(context_options):
        raise ValueError(f"context_options is {shown(context_options)}; it must be a list of contexts, and not empty")
    options = tuple(parse_pair(option, f'context_options: item {at}') for at, option in enumerate(context_options))
    if context_probs is None:
        context_probs = [1 / len(options)] * len(options)
    if not is_distribution(context_probs, len(options)):
        raise ValueError(
            f"context_probs is {shown(context_probs)}; it must have a number from 0 to 1 for each of {len(options)} "
            "options, and they must sum to 1"
        )
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed is {shown(seed)}; it must be a whole number")
    return ContextPolicy(options[0], options, tuple(map(float, context_probs)), seed=int(seed))


class SyncedBatch(tuple[Any, ...]):
    """A batch that was a plain tuple or list."""

    att_context: AttContext | None = None
    context_draw: ContextPolicy | None = None

    def pin_memory(self) -> 'SyncedBatch':
        """Return the batch in pinned memory; the data loader's own method would lose the context."""
        pinned = SyncedBatch(pin_memory(item) for item in self)
        pinned.__dict__.update(self.__dict__)
        return pinned


def attach_context(batch: Any, context: AttContext, policy: ContextPolicy) -> Any:
    """Return the batch with its context ``att_context`` and the policy that drew it, ``context_draw``."""
    if type(batch) in (tuple, list):
        batch = SyncedBatch(batch)
    can_carry = isinstance(batch, SyncedBatch) or dataclasses.is_dataclass(batch)
    if not can_carry:
        raise ValueError(
            f"a batch of type {type(batch).__name__} cannot have a context; collate to a dataclass such as "
            "AudioNoiseBatch, a tuple or a list"
        )
    batch.att_context, batch.context_draw = context, policy
    return batch


class SyncedContextCollate:
    """Collates, draws a context, and sends it along; made by :func:`create_synced_context_collate`."""

    def __init__(self, base_collate_fn: Callable[..., Any], policy: ContextPolicy) -> None:
        if not callable(base_collate_fn):
            raise ValueError(f"base_collate_fn is {shown(base_collate_fn)}; it must be callable")
        self.base_collate_fn, self.policy = base_collate_fn, policy
        self.start_at(0)

    def start_at(self, number: int) -> None:
        """Set the number of the first batch, without a Lightning trainer; persistent workers count from it."""
        self._first, self._collated = number, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Collate, and draw; the arguments are those of the base function."""
        batch, worker = self.base_collate_fn(*args, **kwargs), get_worker_info()
        workers, index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        number = self._first + self._collated * workers + index  # the loader deals batches to its workers in turn
        self._collated += 1
        return attach_context(batch, self.policy.at(number), self.policy)


def create_synced_context_collate(
    base_collate_fn: Callable[..., Any], *arguments: Any, model: Any = None, **by_name: Any
) -> SyncedContextCollate:
    """Return a :class:`SyncedContextCollate`, which draws an attention context for each batch.

    Call it as ``create_synced_context_collate(base_collate_fn, context_options, context_probs=None, seed=0)``, or with
    a model before ``context_options``, which is not needed and not kept.

    The SSL models' training step attends and masks within ``batch.att_context``, in place of the encoder's own draw.
    Under a trainer it is a pure function of (seed, global step): the same on all ranks, and after a resume.

    Args:
        base_collate_fn: makes a dataclass such as ``AudioNoiseBatch``, a tuple or a list. For a lhotse data loader it is
            the loader's own ``collate_fn``.
        context_options: contexts, each a pair [left, right] in attention frames, or the name of a preset.
        context_probs: a probability for each option; None: all alike.

    Raises:
        ValueError: naming the argument, the item and its value.
    """
    if arguments and not isinstance(arguments[0], Sequence):
        arguments = arguments[1:]  # the model
    return SyncedContextCollate(base_collate_fn, parse_policy(*arguments, **by_name))
