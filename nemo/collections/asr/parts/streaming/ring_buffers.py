# SPDX-License-Identifier: Apache-2.0
"""State of live streams: tensors with a row for each, ring buffers, and which slots a query sees.

Position p of a stream is in slot p % slots of a ring. Counts on the CPU define which exist: a later write has no effect.

Shapes: B streams, R rows of them, N positions, S slots, Q queries.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo.collections.asr.parts.att_context.context import UNLIMITED
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.streaming.state import check_like

MOST_ACTIVE = 7 / 8  # share of the batch from which idle rows are computed, too: selecting rows copies their rings
LARGEST_TABLE = 1 << 21  # elements


class Rows:
    """The rows of a batch that a call moves on: those that are ``active``, [B] bool."""

    def __init__(self, active: np.ndarray, device: torch.device):
        moving = np.flatnonzero(active)
        self.active, self.index, self._leader = active, None, moving[0]
        self.is_whole = len(moving) == len(active)  # all rows of the batch move on
        # Nearly all rows are computed as all, and nothing is kept of the idle ones.
        self.computes_idle = not self.is_whole and len(moving) >= MOST_ACTIVE * len(active)
        self.numbers, self.valid = np.arange(len(active)), active
        self.moving = torch.from_numpy(moving).to(device, non_blocking=True)
        if self.computes_idle:
            self.idle = torch.from_numpy(np.flatnonzero(~active)).to(device, non_blocking=True)
        elif not self.is_whole:
            self.numbers, self.valid, self.index = moving, np.ones(len(moving), bool), self.moving

    def counts(self, of_all: np.ndarray) -> np.ndarray:
        """Return the counts [R] of a batch [B]; an idle row has those of a row that moves on."""
        if self.computes_idle:
            return np.where(self.active, of_all, of_all[self._leader])
        return of_all[self.numbers]

    def select(self, kept: Tensor) -> Tensor:
        """Return the rows [R, ...] of a tensor [B, ...]."""
        return kept if self.index is None else kept.index_select(0, self.index)

    def borrow(self, kept: Tensor) -> Tensor:
        """Return the rows [R, ...] of a tensor [B, ...], to change in place and give to :meth:`store`."""
        return kept.clone() if self.computes_idle else self.select(kept)

    def store(self, kept: Tensor, new: Tensor) -> None:
        """Replace the rows of a tensor [B, ...] by new ones [R, ...], of which idle rows are overwritten."""
        if self.index is not None:
            kept.index_copy_(0, self.index, new)
        elif new is not kept:  # as it is where all rows move on and were borrowed
            if self.computes_idle:  # few rows are idle, and an interrupted step leaves them as they were
                new.index_copy_(0, self.idle, kept.index_select(0, self.idle))
            kept.copy_(new)


class Stage:
    """What one stage keeps of all streams: its attributes that are tensors [B, ...] or counts [B] int64."""

    def __init__(self, **kept: Any):
        vars(self).update(kept)

    def kept(self) -> Iterator[tuple[str, Any]]:
        """Yield all tensors and counts by name."""
        for name, value in vars(self).items():
            for index, each in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(each, (Tensor, np.ndarray)):
                    yield f'{name}.{index}' if isinstance(value, list) else name, each

    def reset(self, rows: list[int], counts: bool = True) -> None:
        """Set all that some rows hold to 0; without ``counts`` their counts stay."""
        for _, value in self.kept():
            if counts or isinstance(value, Tensor):
                value[rows] = 0

    def export(self, row: int) -> dict[str, Any]:
        """Return a copy of a row: tensors, and counts as integers."""
        pairs = ((name, value[row]) for name, value in self.kept())
        return {name: each.clone() if isinstance(each, Tensor) else int(each) for name, each in pairs}

    def like(self) -> dict[str, Any]:
        """Return what a state must be like to be loaded."""
        return {name: 0 if isinstance(value, np.ndarray) else value[0] for name, value in self.kept()}

    def check(self, state: Any) -> None:
        """Raise ValueError unless :meth:`load` can take a state."""
        check_like(state, self.like(), type(self).__name__)

    def load(self, row: int, state: dict[str, Any]) -> None:
        """Replace a row by an exported state, which has been checked."""
        for name, value in self.kept():
            given = state[name]
            value[row] = given.to(value.device) if isinstance(given, Tensor) else given

    def bytes(self) -> int:
        """Return how many bytes its tensors take."""
        return sum(value.nbytes for _, value in self.kept() if isinstance(value, Tensor))


class RingBuffer(Stage):
    """The last positions of each stream, tensors of some shape, dtype and device."""

    def __init__(self, batch: int, slots: int, *shape: int, **like: Any):
        self.values = torch.zeros(batch, slots, *shape, **like)
        self.count: np.ndarray = np.zeros(batch, np.int64)

    def write(self, rows: Rows, new: Tensor, counts: np.ndarray) -> None:
        """Append positions [R, N, ...] to streams, of which each row gets ``counts`` [R]; 0 if it is idle."""
        count, slots = new.shape[1], self.values.shape[1]
        first = self.count[rows.numbers] % slots
        if are_alike(first[rows.valid]):
            start = int(first[rows.valid][0])
            room = min(slots - start, count)
            new = new.index_select(0, rows.moving) if rows.computes_idle else new
            for place, piece in ((slice(start, start + room), new[:, :room]), (slice(count - room), new[:, room:])):
                if rows.is_whole:
                    self.values[:, place] = piece
                elif piece.shape[1]:
                    self.values[:, place].index_copy_(0, rows.moving, piece)
        elif self.values.dim() == 2:
            self.values.view(-1).scatter_(0, self._places(rows, first, count), new.reshape(-1))
        else:
            self.values.flatten(0, 1).index_copy_(0, self._places(rows, first, count), new.flatten(0, 1))
        self.count[rows.numbers] += counts

    def read(self, rows: Rows, first: np.ndarray, count: int) -> Tensor:
        """Return ``count`` positions of each row from ``first`` [R] on, [R, count, ...]."""
        slots = self.values.shape[1]
        first = first % slots
        if not are_alike(first):
            found = self.values.flatten(0, 1).index_select(0, self._places(rows, first, count))
            return found.view(len(first), count, *self.values.shape[2:])
        start, own = int(first[0]), self.values
        if start + count <= slots:
            return rows.select(own[:, start : start + count])
        return rows.select(torch.cat((own[:, start:], own[:, : start + count - slots]), dim=1))

    def _places(self, rows: Rows, first: np.ndarray, count: int) -> Tensor:
        """Return the places [R * count] of positions in the flattened ring."""
        slots, device = self.values.shape[1], self.values.device
        starts = torch.from_numpy(np.stack((first, rows.numbers * slots))).to(device, non_blocking=True)
        # an excerpt of a table for each row: to copy it takes a fifth of the time of computing it
        places = _remainders(slots, count, device).unfold(0, count, 1).index_select(0, starts[0])
        return places.add_(starts[1, :, None]).view(-1)


@lru_cache(maxsize=64)
def _remainders(slots: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(slots + count, device=device).remainder_(slots)


class Visible(NamedTuple):
    """What the queries of a push see of a ring; dimension R is 1 or left out if all rows are alike."""

    slots: Tensor  # where the frames that arrive are written, [R, Q]
    ages: Tensor  # column of the table of positions for each query and slot, [R, Q, S] int64; hidden: the last
    began: Tensor | None = None  # whether a query is a frame of its stream, [R, Q, 1] bool; None: all are


@dataclass(eq=False)
class RingWindow:
    """Which slots of a ring of frames the queries of a push see. What comes again is computed once.

    Queries leave ``wait`` frames after they arrive, when all frames of their right context are there.
    """

    window: Window
    slots: int
    wait: int
    device: torch.device

    def __post_init__(self) -> None:
        context, chunk = self.window.context, self.window.chunk
        self.is_unlimited = context.left == UNLIMITED  # all of the past is seen
        self.future = chunk - 1 if self.window.style == 'chunked_limited' else context.right
        self.past = self.slots - 1 if self.is_unlimited else context.left + chunk - 1
        self._start = self.slots + self.wait  # from here on a phase comes again
        self._phases = 0 if self.is_unlimited else math.lcm(self.slots, chunk)
        self._tables = cache(self._compute_tables)
        self._of_phase = cache(lambda count, first: self._visible(*self.compute(np.array([first]), count)))

    def visible(self, first: np.ndarray, count: int, last: np.ndarray | None = None) -> Visible:
        """Return what the queries of a push see: ``count`` frames arrive, the first at position ``first`` [R].

        Streams that end have no frames from position ``last`` [R] on.
        """
        alike, size = are_alike(first), (self._start + self._phases) * count * self.slots
        if last is not None or not self._phases or first.min() < 0 or size > LARGEST_TABLE:
            return self._visible(*self.compute(first[:1] if alike and last is None else first, count, last))
        index = np.where(first < self._start, first, self._start + (first - self._start) % self._phases)
        if alike:
            return self._of_phase(count, int(index[0]))
        begins, tables = self._tables(count)
        places = self._tensor(index)
        return Visible(*(table.index_select(0, places) for table in tables[: 3 if begins[index].any() else 2]))

    def compute(self, first: np.ndarray, count: int, last: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """Return slots [R, Q], ages [R, Q, S] and began [R, Q, 1]; see :class:`Visible`."""
        arriving = first[:, None] + np.arange(count)
        newest = arriving[:, -1:, None]
        held = newest - (newest - np.arange(self.slots)) % self.slots  # position in each slot
        query = arriving[:, :, None] - self.wait
        hidden = ~self.window.sees(np.maximum(query, 0), held) | (held < 0)
        if last is not None:
            hidden |= held >= last[:, None, None]
        ages = np.where(hidden, self.past + 1, np.clip(query - held, -self.future, self.past)) + self.future
        return arriving % self.slots, ages, query >= 0

    def _compute_tables(self, count: int) -> tuple[Any, list[Tensor]]:
        """Return for each phase whether queries are before the stream, and what they see."""
        found = self.compute(np.arange(self._start + self._phases), count)
        return ~found[2].all((1, 2)), [*map(self._tensor, found)]

    def _visible(self, slots: np.ndarray, ages: np.ndarray, began: np.ndarray) -> Visible:
        slots, ages = (values[0] if len(values) == 1 else values for values in (slots, ages))
        return Visible(self._tensor(slots), self._tensor(ages), None if began.all() else self._tensor(began))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


ring_window = lru_cache(maxsize=32)(RingWindow)  # all layers and sessions share what is computed for a window


def are_alike(counts: np.ndarray) -> bool:
    """Return whether all counts are the same."""
    return len(counts) == 1 or bool((counts == counts[0]).all())
