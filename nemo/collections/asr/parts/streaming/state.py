# SPDX-License-Identifier: Apache-2.0
"""States of live streams: plain containers and tensors that are checked as a whole before they are loaded."""

import dataclasses
import importlib
from array import array

import numpy as np
import torch

VERSION = 6  # of what StreamingSession.export and state_dict return
PLAIN = (int, float, str, bool, type(None))
CLASSES = (  # of which a state may have dataclasses: packages and modules
    *('nemo.collections.asr.parts.streaming.', 'nemo.collections.asr.modules.ssl_modules.masked_time_line.'),
    *('nemo.collections.asr.parts.submodules.transducer_decoding.', 'nemo.collections.asr.parts.utils.rnnt_utils.'),
)
ARRAY = 'array.array'


class StreamStates:
    """What a stage keeps of streams, in a dataclass for each."""

    def __init__(self, batch: int, device: torch.device):
        self.device = device
        self.streams = [self.new_stream() for _ in range(batch)]

    def new_stream(self):
        """Return the state before the first frame."""
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
        check_like(state, to_plain(self.new_stream()), type(self).__name__)

    def load(self, row: int, state: dict) -> None:
        """Replace a row by an exported state, which has been checked."""
        self.streams[row] = from_plain(state, self.device)

    def bytes(self) -> int:
        """Return how many bytes its tensors take."""
        return sum(map(_bytes, self.streams))


def check_like(found, fresh, where: str) -> None:
    """Raise ValueError, with the place, unless a plain state is built like a fresh one.

    Where the fresh one has None there may be any value; a dimension that is 0 there may be any.
    """
    if isinstance(fresh, dict):
        alike = isinstance(found, dict) and found.keys() == fresh.keys()
        for name in fresh if alike else ():
            check_like(found[name], fresh[name], f'{where}.{name}')
    elif isinstance(fresh, torch.Tensor):
        alike = isinstance(found, torch.Tensor) and (found.dtype, found.dim()) == (fresh.dtype, fresh.dim())
        alike = alike and all(size in (0, given) for size, given in zip(fresh.shape, found.shape, strict=True))
    elif isinstance(fresh, list):
        alike = isinstance(found, list) and len(found) == len(fresh)
    elif isinstance(fresh, str):
        alike = found == fresh
    else:
        alike = fresh is None or (type(found) is type(fresh) and found >= 0)
    if not alike:
        raise ValueError(f"load: {where} is {_described(found)}; it must be like {_described(fresh)}")


def _described(value) -> str:
    if isinstance(value, torch.Tensor):
        return f'{value.dtype} {list(value.shape)}'
    return f'{sorted(value)}' if isinstance(value, dict) else f'{value!r:.80}'


def to_plain(value):
    """Return a copy as plain containers and tensors; ValueError if it holds another type."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, array):
        return {'class': ARRAY, 'fields': {'kind': value.typecode, 'values': torch.from_numpy(np.array(value))}}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_plain, value))
    if dataclasses.is_dataclass(value):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {'class': f'{type(value).__module__}.{type(value).__qualname__}', 'fields': fields}
    if isinstance(value, PLAIN):
        return value
    raise ValueError(f"export: the state of the stream has a {type(value).__name__}, which is no plain value")


def from_plain(value, device: torch.device):
    """Return a copy of what :func:`to_plain` was given, with its tensors on a device; ValueError for other classes."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, (list, tuple)):
        return type(value)(from_plain(each, device) for each in value)
    if not isinstance(value, dict):
        return value
    name, fields = value['class'], value['fields']
    if name == ARRAY:
        return array(fields['kind'], fields['values'].tolist())
    if not name.startswith(CLASSES):
        raise ValueError(f"load: {name} is no state of a stream")
    module, _, name = name.rpartition('.')
    made = getattr(importlib.import_module(module), name)
    return made(**{field: from_plain(state, device) for field, state in fields.items()})


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, vars(value).values())) if dataclasses.is_dataclass(value) else 0
