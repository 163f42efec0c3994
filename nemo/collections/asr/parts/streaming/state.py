# SPDX-License-Identifier: Apache-2.0
"""States of live streams: plain containers and tensors that are checked as a whole before they are loaded."""

import dataclasses
import importlib
from array import array
from typing import Any

import numpy as np
import torch

VERSION = 6  # of what StreamingSession.export and state_dict return
PLAIN = (int, float, str, bool, type(None))
CLASSES = (  # that a state may hold: modules, or packages, of dataclasses
    'nemo.collections.asr.parts.streaming.',
    'nemo.collections.asr.modules.ssl_modules.masked_time_line.',
    'nemo.collections.asr.parts.submodules.transducer_decoding.',
    'nemo.collections.asr.parts.utils.rnnt_utils.',
)


class StreamStates:
    """What a stage keeps of streams in an object for each; ``name`` is that of errors."""

    name = ''

    def __init__(self, batch: int, device: torch.device):
        self.device = device
        self.streams = [self.new_stream() for _ in range(batch)]

    def new_stream(self):
        """Return the state before the first frame, a dataclass."""
        raise NotImplementedError

    def reset(self, rows: list[int]) -> None:
        """Restart streams."""
        for row in rows:
            self.streams[row] = self.new_stream()

    def export(self, row: int) -> dict:
        """Return a copy of a row: plain containers and tensors."""
        return to_plain(self.streams[row])

    def check(self, state: dict) -> None:
        """Raise ValueError unless :meth:`load` can take a state."""
        self.restored(state)

    def load(self, row: int, state: dict) -> None:
        """Replace a row by an exported state, which has been checked."""
        self.streams[row] = self.restored(state)

    def restored(self, state: dict):
        """Return the object of an exported state."""
        return restored(state, self.new_stream(), self.name, self.device)

    def bytes(self) -> int:
        """Return how many bytes its tensors take."""
        return sum(_bytes(stream) for stream in self.streams)


def check_settings(found, expected: dict) -> None:
    """Raise ValueError, with what differs, unless a state was made with the settings of this session."""
    if not isinstance(found, dict) or found.get('version') != VERSION or not isinstance(found.get('of'), dict):
        raise ValueError("load: this is no state of a StreamingSession of this version")
    given = found['of']
    other = [
        f'{name} ({given.get(name)}, here {value})' for name, value in expected.items() if given.get(name) != value
    ]
    if other:
        raise ValueError(f"load: the state is of a session with another {', '.join(other)}")


def to_plain(value):
    """Return a copy as plain containers and tensors.

    Raises:
        ValueError: if it holds another type.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, array):
        return torch.from_numpy(np.array(value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_plain, value))
    if dataclasses.is_dataclass(value):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {'class': f'{type(value).__module__}.{type(value).__qualname__}', 'fields': fields}
    if isinstance(value, PLAIN):
        return value
    raise ValueError(f"export: the state of the stream has a {type(value).__name__}, which is no plain value")


def from_plain(value, device: torch.device):
    """Return a copy of what :func:`to_plain` was given, with its tensors on a device.

    Raises:
        ValueError: if it is damaged, or of a class that no state has.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, (list, tuple)):
        return type(value)(from_plain(each, device) for each in value)
    if not isinstance(value, dict):
        return value
    name, fields = str(value.get('class')), value.get('fields')
    if not name.startswith(CLASSES) or not isinstance(fields, dict):
        raise ValueError(f"load: {name} is no state of a stream")
    module, _, name = name.rpartition('.')
    try:
        made = getattr(importlib.import_module(module), name)
        return made(**{field: from_plain(state, device) for field, state in fields.items()})
    except (AttributeError, ImportError, TypeError) as error:
        raise ValueError(f"load: {name} is damaged: {error}") from error


def restored(found, fresh, where: str, device: torch.device):
    """Return a copy of a plain state that is built like the state of a fresh stream.

    Where the fresh one has None there may be any value; a dimension that is 0 there may be any.

    Raises:
        ValueError: if it is built otherwise, with the place.
    """
    if fresh is None:
        return from_plain(found, device)
    if dataclasses.is_dataclass(fresh):
        fields = found.get('fields') if isinstance(found, dict) else None
        if isinstance(fields, dict) and fields.keys() == vars(fresh).keys():
            values = vars(fresh).items()
            kind: Any = type(fresh)
            return kind(**{name: restored(fields[name], of, f'{where}.{name}', device) for name, of in values})
    elif isinstance(fresh, (torch.Tensor, array)):
        like = to_plain(fresh)
        if isinstance(found, torch.Tensor) and (found.dtype, found.dim()) == (like.dtype, like.dim()):
            if all(size in (0, given) for size, given in zip(like.shape, found.shape, strict=True)):
                is_array = isinstance(fresh, array)
                return array(fresh.typecode, found.tolist()) if is_array else found.to(device, copy=True)
    elif type(found) is type(fresh):
        return found
    raise ValueError(
        f"load: {where} is damaged: {type(found).__name__}, not {type(fresh).__name__} as in a new stream"
    )


def joined(earlier: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """Join what waits with what is new along the first dimension; None is nothing."""
    if earlier is None or new is None:
        return new if earlier is None else earlier
    return torch.cat((earlier, new))


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, vars(value).values())) if dataclasses.is_dataclass(value) else 0
