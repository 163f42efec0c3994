# SPDX-License-Identifier: Apache-2.0
"""What torch's operations do on a GPU that they do not do on a CPU: refuse a tensor of the host, wait, copy.

Each function takes ``is_there``, which tells whether a value is a tensor of the device.
"""

from collections.abc import Callable, Sequence

import torch
from device.host_traffic import note

aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy, aten.copy)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
HALF_TO_FLOAT = (aten._softmax, aten._log_softmax)  # a step of their own on a GPU, and not on the CPU
TAKES_HOST_SCALARS = (*COPIES, *INDEXED, aten.fill_, aten.fill, aten.masked_fill, aten.masked_fill_, aten.where)
WAITING = [
    getattr(aten, name)
    for name in (
        '_local_scalar_dense item is_nonzero equal nonzero masked_select _unique _unique2 unique_dim '
        'unique_consecutive bincount _linalg_check_errors'
    ).split()
]
INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool)
MASK_DTYPES = (torch.bool, torch.uint8)
Predicate = Callable[[object], bool]


class MixedDevices(RuntimeError):
    """An operation was asked for on tensors of the device and of the host."""


def refuse_mixed(operation, tensors: Sequence[torch.Tensor], is_there: Predicate) -> None:
    """Raise ``MixedDevices`` where a GPU fails: few operations take a tensor of the host, and only a scalar one.

    Args:
        operation: an overload of torch.
        tensors: all that it is given, at least one of the device.
        is_there: tells whether a tensor is on the device.
    """
    packet = operation.overloadpacket
    if packet in COPIES:
        return
    here = [tensor for tensor in tensors if not is_there(tensor)]
    if packet in INDEXED and is_there(tensors[0]):  # an index of the host is copied
        here = [tensor for tensor in here if tensor.dtype not in INDEX_DTYPES]
    scalars = torch.Tag.pointwise in operation.tags or packet in TAKES_HOST_SCALARS
    if any(tensor.dim() or not scalars for tensor in here):
        shapes = [(tensor.device.type, list(tensor.shape)) for tensor in tensors]
        raise MixedDevices(f"{packet} got tensors of two devices: {shapes}")


def note_waits(operation, args, kwargs, is_there: Predicate) -> None:
    """Note where the host needs a value, or a size, that only the device has; ``kwargs`` are the operation's, too."""
    packet = operation.overloadpacket
    if packet in WAITING and is_there(args[0]):
        note('wait', packet.__name__)
    elif packet is aten.repeat_interleave and operation._overloadname == 'Tensor':
        if kwargs.get('output_size') is None:
            note('wait', 'repeat_interleave')
    elif packet in INDEXED:
        _note_index(packet.__name__, *args[:3], is_there=is_there)


def _note_index(name: str, target, indices, value=None, *, is_there: Predicate) -> None:
    """Note what an index asks: a mask is counted first, unless one value is put there; what is on the host is copied."""
    indices = [index for index in indices if index is not None]
    by_mask = any(index.dtype in MASK_DTYPES for index in indices)
    filled = by_mask and value is not None and value.numel() == 1
    if by_mask and not filled:
        note('wait', f'{name} by a mask')
    if is_there(target) and any(not is_there(index) for index in indices):
        note('copy to device', f'{name} by an index of the host')
    if is_there(target) and value is not None and not is_there(value) and not filled:
        note('copy to device', f'{name} of a value of the host')


def note_copy(operation, args, to_device: bool, is_there: Predicate) -> None:
    """Note a copy between host and device; ``to_device`` tells where a new tensor is made."""
    packet = operation.overloadpacket
    if packet not in COPIES:
        return
    source, target_there = (args[0], to_device) if packet is aten._to_copy else (args[1], is_there(args[0]))
    if is_there(source) != target_there:
        note('copy to device' if target_there else 'copy to host', packet.__name__.strip('_'))
