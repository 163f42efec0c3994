# SPDX-License-Identifier: Apache-2.0
"""States of live streams: plain containers and tensors that are checked as a whole before they are loaded."""

from collections.abc import Iterator

import torch

VERSION = 5  # of what StreamingSession.export and state_dict return


def check_settings(found, expected: dict) -> None:
    """Raise ValueError, with what differs, unless a state was made with the settings of this session."""
    if not isinstance(found, dict) or found.get('version') != VERSION or not isinstance(found.get('of'), dict):
        raise ValueError("load: this is no state of a StreamingSession of this version")
    other = [
        f'{name} ({found["of"].get(name)}, here {value})'
        for name, value in expected.items()
        if found['of'].get(name) != value
    ]
    if other:
        raise ValueError(f"load: the state is of a session with another {', '.join(other)}")


def check_like(found, fresh, where: str) -> None:
    """Raise ValueError unless a state is built like one of a fresh stream.

    Where the fresh one has None there may be a tensor or a container; a dimension that is 0 there may be any.
    """
    if fresh is None:
        return
    if isinstance(fresh, dict):
        if not isinstance(found, dict) or found.keys() != fresh.keys():
            raise ValueError(f"load: {where} holds other entries than {sorted(fresh)}")
        for name, value in fresh.items():
            check_like(found[name], value, f'{where}.{name}')
    elif isinstance(fresh, torch.Tensor):
        alike = isinstance(found, torch.Tensor) and (found.dtype, found.dim()) == (fresh.dtype, fresh.dim())
        if not alike or any(size and size != given for size, given in zip(fresh.shape, found.shape, strict=True)):
            raise ValueError(f"load: {where} must be a tensor like {list(fresh.shape)} {fresh.dtype}")
    elif type(found) is not type(fresh):
        raise ValueError(f"load: {where} is {found!r}; it must be {type(fresh).__name__}")


def joined(earlier: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """Join what waits with what is new along the first dimension; None is nothing."""
    if earlier is None or new is None:
        return new if earlier is None else earlier
    return torch.cat((earlier, new))


def copy_tensors(state, device=None):
    """Copy nested containers with their tensors, which go to ``device`` if given."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone() if device is None else state.detach().to(device, copy=True)
    if isinstance(state, dict):
        return {name: copy_tensors(value, device) for name, value in state.items()}
    return [copy_tensors(value, device) for value in state] if isinstance(state, list) else state


def tensors_of(state) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested containers."""
    if isinstance(state, torch.Tensor):
        yield state
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    for value in values:
        yield from tensors_of(value)
