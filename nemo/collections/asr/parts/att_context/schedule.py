# SPDX-License-Identifier: Apache-2.0
"""Contexts that change along something: along an encoder's layers, or along the steps of a training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, is_sequence, shown
from nemo.utils import logging

INTERPOLATIONS = ('step', 'linear')
ANCHORS = 'anchors [layer, [left, right]], such as [0, [40, 0]]'  # as errors name them

LayerContexts = tuple[AttContext | None, ...]  # None for a layer without a context of its own
Check = Callable[[AttContext, str], object]  # raises ValueError, beginning with the place, if it is not supported


@dataclass(frozen=True)
class ContextSchedule:
    """Contexts at some positions (layers, or steps), and what holds in between."""

    anchors: tuple[tuple[int, AttContext], ...]  # (position, context), in rising order of positions
    linear: bool = False  # whether contexts between two anchors are interpolated; otherwise the last anchor holds

    @classmethod
    def parse(
        cls,
        anchors: Any,
        field: str,
        unit: str = 'layer',
        end: int | None = None,
        interpolate: str = 'step',
        check: Check | None = None,
    ) -> 'ContextSchedule':
        """Read a schedule such as ``[[0, [40, 0]], [6, [120, 0]]]``: positions below ``end``, and contexts.

        Raises:
            ValueError: naming ``field``, the item's index, its value and what is allowed.
        """
        if interpolate not in INTERPOLATIONS:
            raise ValueError(f"{field}: interpolate is {interpolate!r}; it must be one of {INTERPOLATIONS}")
        parsed: list[tuple[int, AttContext]] = []
        for index, item in enumerate(_items(anchors, field, f'pairs [{unit}, [left, right]]')):
            where = f'{field}: item {index}, {item!r}'
            position = _parse_position(item, where, unit, end)
            context = parse_pair(item[1], where, check)
            if parsed and position <= parsed[-1][0]:
                raise ValueError(
                    f"{where}: {unit} {position} follows {unit} {parsed[-1][0]}; they must rise, without repetition"
                )
            if parsed and interpolate == 'linear':
                _check_limits_on_both_ends(parsed[-1][1], context, where)
            parsed.append((position, context))
        return cls(tuple(parsed), interpolate == 'linear')

    def at(self, position: int, multiple: int = 1) -> AttContext | None:
        """Return the context at a position, None before the first anchor.

        Interpolated left contexts are rounded down to a ``multiple``, the chunk of the attention style. Above 1 the right
        context, which defines the chunk, goes by steps.
        """
        reached = [anchor for anchor in self.anchors if anchor[0] <= position]
        if not reached:
            return None
        start, before = reached[-1]
        if not self.linear or len(reached) == len(self.anchors):
            return before
        end, after = self.anchors[len(reached)]
        left, right = (a + (b - a) * (position - start) // (end - start) for a, b in zip(before, after))
        if multiple > 1:
            return AttContext(max(left // multiple * multiple, UNLIMITED), before.right)
        return AttContext(left, right)


def parse_layer_contexts(
    value: Any, num_layers: int, field: str, multiple: int = 1, check: Check | None = None
) -> LayerContexts:
    """Return each layer's own context.

    Args:
        value: one context per layer (None for a layer without); a schedule of anchors ``[[0, [40, 0]], [6, [120, 0]]]``,
            of which each layer takes the last at or below it; or ``{'anchors': [...], 'interpolate': 'linear'}``.
        multiple: as in :meth:`ContextSchedule.at`.

    Raises:
        ValueError: as :meth:`ContextSchedule.parse` does.
    """
    interpolate = 'step'
    if isinstance(value, Mapping):
        if 'anchors' not in value or set(value) - {'anchors', 'interpolate'}:
            raise ValueError(f"{field} is {dict(value)!r}; as a mapping it takes anchors and interpolate")
        value, interpolate = value['anchors'], value.get('interpolate', 'step')
    elif not is_sequence(value) or not any(map(_is_anchor, value)):
        return _one_per_layer(value, num_layers, field, check)
    schedule = ContextSchedule.parse(value, field, 'layer', num_layers, interpolate, check)
    return tuple(schedule.at(layer, multiple) for layer in range(num_layers))


def parse_own_context(value: Any, field: str) -> AttContext:
    """Read a context of a layer's own as ``AttContext.parse`` does; ``[40]`` means ``[40, 0]``, too."""
    if is_sequence(value) and len(value) == 1 and isinstance(value[0], Integral):
        value = [value[0], 0]
    return AttContext.parse(value, field=field)


def _is_anchor(item: Any) -> bool:
    """Whether it is a pair whose second part is a context rather than a number."""
    return is_sequence(item) and len(item) == 2 and not isinstance(item[1], (int, float))


def _one_per_layer(value: Any, num_layers: int, field: str, check: Check | None) -> LayerContexts:
    items = _items(value, field, 'contexts [left, right], one per layer, or pairs [layer, [left, right]]')
    if len(items) != num_layers:
        raise ValueError(
            f"{field} is {shown(value)}, which has {len(items)} contexts, the encoder {num_layers} layers; give one "
            f"context [left, right] per layer, or {ANCHORS}"
        )
    try:
        return tuple(
            None if item is None else parse_pair(item, f'{field}: item {index}, {item!r}', check)
            for index, item in enumerate(items)
        )
    except ValueError as error:
        raise ValueError(f"{error}. {shown(value)} are contexts, one per layer; a schedule has {ANCHORS}") from error


def _items(value: Any, field: str, wanted: str) -> Sequence[Any]:
    if not is_sequence(value) or not len(value):
        raise ValueError(f"{field} is {value!r}; it must be a list of {wanted}, and not empty")
    return value


def _parse_position(item: Any, where: str, unit: str, end: int | None) -> int:
    if not is_sequence(item) or len(item) != 2:
        raise ValueError(f"{where}: it must be a pair [{unit}, [left, right]]")
    position = item[0]
    whole = isinstance(position, Integral) and not isinstance(position, bool)
    if not whole or position < 0 or (end is not None and position >= end):
        allowed = '0 or more' if end is None else f'from 0 to {end - 1}'
        raise ValueError(f"{where}: the {unit} is {position!r}; it must be a whole number, {allowed}")
    return int(position)


def parse_pair(value: Any, where: str, check: Check | None = None) -> AttContext:
    """Read and check a context of a list; warn if it has no past, and refuse a number alone."""
    if isinstance(value, Integral):
        raise ValueError(f"{where}: {value!r} is no context; give a pair [left, right] in attention frames")
    context = parse_own_context(value, where)
    if check is not None:
        check(context, where)
    if context.left == 0:
        logging.warning(f"{where}: with a left context of 0 a frame attends to no earlier frame")
    return context


def _check_limits_on_both_ends(first: AttContext, second: AttContext, where: str) -> None:
    if any((one == UNLIMITED) != (other == UNLIMITED) for one, other in zip(first, second)):
        raise ValueError(
            f"{where}: from {first.as_list()} to {second.as_list()} a side becomes, or ceases to be, unlimited (-1); "
            "linear interpolation needs limits on both ends"
        )
