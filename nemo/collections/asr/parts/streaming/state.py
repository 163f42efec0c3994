# SPDX-License-Identifier: Apache-2.0
"""States of live streams: plain containers and tensors, checked as a whole before loading."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

VERSION = 9  # of what StreamingSession.export and state_dict return


class StreamStates:
    """What a stage keeps of streams, a dataclass for each; ``new_stream`` makes a new stream's."""

    def __init__(self, batch: int, device: torch.device, new_stream: Callable[[], Any]):
        self.device, self.new_stream = device, new_stream
        self.streams = [new_stream() for _ in range(batch)]

    def reset(self, rows: list[int]) -> None:
        """Restart streams."""
        for row in rows:
            self.streams[row] = self.new_stream()

    def export(self, row: int) -> Any:
        """Return a copy of a row: plain containers and tensors, each with a storage of its own."""
        return apply_to_collection(dataclasses.asdict(self.streams[row]), torch.Tensor, torch.Tensor.clone)

    def check(self, state: Any) -> None:
        """Raise ValueError unless :meth:`load` can take a state."""
        check_like(state, dataclasses.asdict(self.new_stream()), type(self).__name__)

    def load(self, row: int, state: Any) -> None:
        """Replace a row by an exported state, which has been checked."""
        self.streams[row] = _restored(state, self.new_stream(), self.device)

    def bytes(self) -> int:
        """Return how many bytes its tensors take."""
        return sum(map(_bytes, self.streams))


def check_like(found: Any, fresh: Any, where: str) -> None:
    """Raise ValueError, with the place, unless a plain state is built like a fresh one.

    Where the fresh one has None there may be any value; a length or dimension that is 0 there may be any.
    """
    if fresh is None:
        return
    alike = type(found) is type(fresh)
    if alike and isinstance(fresh, dict):
        alike = found.keys() == fresh.keys()
        for name in fresh if alike else ():
            check_like(found[name], fresh[name], f'{where}.{name}')
    elif alike and isinstance(fresh, torch.Tensor):
        alike = (found.dtype, found.dim()) == (fresh.dtype, fresh.dim())
        alike = alike and all(size in (0, given) for size, given in zip(fresh.shape, found.shape, strict=True))
    elif alike and isinstance(fresh, list):
        alike = len(fresh) in (0, len(found))
    elif alike:
        alike = isinstance(fresh, str) or found >= 0
    if not alike:
        raise ValueError(f"load: {where} is {_described(found)}; it must be like {_described(fresh)}")


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f'{value.dtype} {list(value.shape)}'
    return f'{sorted(value)}' if isinstance(value, dict) else f'{value!r:.80}'


def _restored(value: Any, fresh: Any, device: torch.device) -> Any:
    """Return a copy of an exported value, as the dataclass that a fresh one is, with tensors on a device."""
    if not dataclasses.is_dataclass(fresh):
        return apply_to_collection(value, torch.Tensor, lambda tensor: tensor.to(device, copy=True))
    fields = {name: _restored(each, getattr(fresh, name), device) for name, each in value.items()}
    kind: Any = type(fresh)
    return kind(**fields)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, vars(value).values())) if dataclasses.is_dataclass(value) else 0
