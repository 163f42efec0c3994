# SPDX-License-Identifier: Apache-2.0
"""Contexts that change along something: along an encoder's layers, or along the steps of a training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, shown
from nemo.utils import logging

INTERPOLATIONS = ('step', 'linear')
ANCHORS = 'anchors [layer, [left, right]], such as [0, [40, 0]]'  # as errors name them

Check = Callable[[AttContext, str], None]
"""Raises ValueError, beginning with the given place, if the context cannot be followed."""


@dataclass(frozen=True)
class ContextSchedule:
    """Contexts at some positions (layers, or steps), and what holds in between."""

    anchors: tuple[tuple[int, AttContext], ...]
    """(position, context), in rising order of positions."""
    linear: bool = False
    """Whether contexts between two anchors are interpolated; otherwise the last anchor holds."""

    @classmethod
    def parse(
        cls,
        anchors,
        field: str,
        unit: str = 'layer',
        end: int | None = None,
        interpolate: str = 'step',
        check: Check | None = None,
    ) -> 'ContextSchedule':
        """Read a schedule such as ``[[0, [40, 0]], [6, [120, 0]]]``.

        Args:
            anchors: pairs of a position and a context.
            field: the config key to name in an error.
            unit: what a position is.
            end: the first position that is too high; None = any will do.
            interpolate: ``step`` or ``linear``.
            check: what else the contexts must comply with.

        Raises:
            ValueError: naming ``field``, the item's index, its value and what is allowed.
        """
        if interpolate not in INTERPOLATIONS:
            raise ValueError(f"{field}: interpolate is {interpolate!r}; it must be one of {INTERPOLATIONS}")
        items = _items(anchors, field, f'pairs [{unit}, [left, right]]')
        parsed = []
        for index, item in enumerate(items):
            where = f'{field}: item {index}, {item!r}'
            position, context = _parse_anchor(item, where, unit, end)
            if parsed and position <= parsed[-1][0]:
                raise ValueError(
                    f"{where}: {unit} {position} follows {unit} {parsed[-1][0]}; they must rise, without repetition"
                )
            _accept(context, where, check)
            parsed.append((position, context))
        schedule = cls(tuple(parsed), interpolate == 'linear')
        schedule._check_interpolation(field)
        return schedule

    def _check_interpolation(self, field: str) -> None:
        if not self.linear:
            return
        for index, ((_, before), (_, after)) in enumerate(zip(self.anchors, self.anchors[1:]), 1):
            for side, first, second in (
                ('left', before.left, after.left),
                ('right', before.right, after.right),
            ):
                if (first == UNLIMITED) != (second == UNLIMITED):
                    raise ValueError(
                        f"{field}: item {index}: from {before.as_list()} to {after.as_list()} the {side} context "
                        "becomes, or ceases to be, unlimited (-1); linear interpolation needs limits on both ends"
                    )

    def at(self, position: int, multiple: int = 1) -> AttContext | None:
        """Return the context at a position, None before the first anchor.

        Args:
            position: a layer, or a step.
            multiple: interpolated left contexts are rounded down to a multiple of this, the chunk of the attention
                style. Above 1 the right context, which defines the chunk, goes by steps.
        """
        reached = [index for index, (start, _) in enumerate(self.anchors) if start <= position]
        if not reached:
            return None
        start, before = self.anchors[reached[-1]]
        if not self.linear or len(reached) == len(self.anchors):
            return before
        end, after = self.anchors[reached[-1] + 1]
        share = position - start, end - start
        left = _between(before.left, after.left, *share) if before.left != UNLIMITED else UNLIMITED
        if multiple > 1:
            return AttContext(left // multiple * multiple if left > 0 else left, before.right)
        return AttContext(left, _between(before.right, after.right, *share))


def parse_layer_contexts(
    value, num_layers: int, field: str, multiple: int = 1, check: Check | None = None
) -> tuple[AttContext | None, ...]:
    """Return each layer's own context, None for a layer without one.

    Args:
        value: one context per layer (None for a layer without); a schedule of anchors
            ``[[0, [40, 0]], [6, [120, 0]], [12, [320, 0]]]``, of which each layer takes the last at or below it;
            or ``{'anchors': [...], 'interpolate': 'linear'}``.
        num_layers: layers of the encoder.
        field: the config key to name in an error.
        multiple: see :meth:`ContextSchedule.at`.
        check: what else the contexts must comply with.

    Raises:
        ValueError: naming ``field``, the item's index, its value and what is allowed.
    """
    interpolate = 'step'
    if isinstance(value, Mapping):
        rest = dict(value)
        anchors, interpolate = rest.pop('anchors', None), rest.pop('interpolate', 'step')
        if rest or anchors is None:
            raise ValueError(f"{field} is {dict(value)!r}; as a mapping it takes anchors and interpolate")
        value = anchors
    elif not _is_schedule(value):
        return _one_per_layer(value, num_layers, field, check)
    schedule = ContextSchedule.parse(value, field, 'layer', num_layers, interpolate, check)
    return tuple(schedule.at(layer, multiple) for layer in range(num_layers))


def _is_schedule(value) -> bool:
    """Whether any item is an anchor: a pair whose second part is a context rather than a number."""
    if not _is_sequence(value):
        return False
    return any(_is_sequence(item) and len(item) == 2 and not isinstance(item[1], (int, float)) for item in value)


def _one_per_layer(value, num_layers: int, field: str, check: Check | None) -> tuple[AttContext | None, ...]:
    items = _items(value, field, 'contexts [left, right], one per layer, or pairs [layer, [left, right]]')
    contexts = []
    for index, item in enumerate(items):
        where = f'{field}: item {index}, {item!r}'
        contexts.append(None if item is None else _parse_pair(item, where))
    if len(contexts) != num_layers:
        raise ValueError(
            f"{field} is {shown(value)}, which has {len(contexts)} contexts, the encoder {num_layers} layers; give one "
            f"context [left, right] per layer, or {ANCHORS}"
        )
    try:
        for index, context in enumerate(contexts):
            if context is not None:
                _accept(context, f'{field}: item {index}, {items[index]!r}', check)
    except ValueError as error:
        if not _look_like_anchors(contexts):
            raise
        raise ValueError(f"{error}. {shown(value)} are contexts, one per layer; a schedule has {ANCHORS}") from error
    return tuple(contexts)


def _look_like_anchors(contexts) -> bool:
    """Whether these contexts, which the encoder cannot follow, may be meant as pairs of a layer and a left context."""
    if None in contexts or any(context.right <= 0 for context in contexts):
        return False
    layers = [context.left for context in contexts]
    return layers == sorted(set(layers)) and layers[-1] < len(layers)


def _items(value, field: str, wanted: str):
    if not _is_sequence(value) or not len(value):
        raise ValueError(f"{field} is {value!r}; it must be a list of {wanted}, and not empty")
    return value


def _parse_anchor(item, where: str, unit: str, end: int | None) -> tuple[int, AttContext]:
    if not _is_sequence(item) or len(item) != 2:
        raise ValueError(f"{where}: it must be a pair [{unit}, [left, right]]")
    position, context = item
    allowed = '0 or more' if end is None else f'from 0 to {end - 1}'
    whole = isinstance(position, Integral) and not isinstance(position, bool)
    if not whole or position < 0 or (end is not None and position >= end):
        raise ValueError(f"{where}: the {unit} is {position!r}; it must be a whole number, {allowed}")
    return int(position), _parse_pair(context, where, f'in attention frames, as in [{unit}, [40, 0]]')


def _parse_pair(value, where: str, wanted: str = 'in attention frames') -> AttContext:
    if isinstance(value, Integral):  # AttContext.parse would take it for a left context; here it may be a slip
        raise ValueError(f"{where}: {value!r} is no context; give a pair [left, right] {wanted}")
    return parse_own_context(value, where)


def parse_own_context(value, field: str) -> AttContext:
    """Read a context of a layer's own as ``AttContext.parse`` does; ``[40]`` means ``[40, 0]``, too.

    Raises:
        ValueError: if it is no context.
    """
    if _is_sequence(value) and len(value) == 1 and isinstance(value[0], Integral):
        value = [value[0], 0]
    return AttContext.parse(value, field=field)


def _accept(context: AttContext, where: str, check: Check | None) -> None:
    """Check a context by the caller's check, and warn of one without a past."""
    if check is not None:
        check(context, where)
    if context.left == 0:
        logging.warning(f"{where}: with a left context of 0 a frame sees nothing of its past")


def _between(first: int, second: int, steps: int, of_steps: int) -> int:
    return first + (second - first) * steps // of_steps


def _is_sequence(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
