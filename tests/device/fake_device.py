# SPDX-License-Identifier: Apache-2.0
"""A fake device for the CPU build of torch. It computes on the CPU and refuses what a GPU refuses.

A tensor of the device wraps one on the CPU, so results are real and forward, backward and optimizer can be compared
with the CPU's. An operation on tensors of both devices fails. ``host_traffic`` records each host-device
synchronisation and copy.

Registering the device is global and cannot be undone: it belongs into a process of its own.
"""

from contextlib import nullcontext

import torch
from device.gpu_rules import HALF_TO_FLOAT, note_copy, note_waits, refuse_mixed
from device.host_traffic import note
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = 'fakegpu'


class DeviceTensor(torch.Tensor):
    """A tensor of the device; ``on_host`` is the CPU's tensor that has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: torch.Tensor):
        layout = dict(strides=on_host.stride(), storage_offset=on_host.storage_offset(), dtype=on_host.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, on_host.shape, device=_device, **layout)

    def __init__(self, on_host: torch.Tensor):
        self.on_host = on_host

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _execute(operation, args, kwargs or {})

    def tolist(self):
        """Return the values, copied to the host; torch refuses it for subclasses."""
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            twin = DeviceTensor(self.on_host.clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(twin, self.requires_grad) if _is_parameter(self) else twin
        return memo[id(self)]


class _EverywhereOnTheDevice(TorchDispatchMode):
    """Sees each operation, also those that make a tensor from nothing."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _execute(operation, args, kwargs or {})


class _DeviceModule:
    """What ``torch.fakegpu`` must have."""

    device = staticmethod(lambda index: nullcontext())
    is_available = is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    synchronize = staticmethod(lambda device=None: note('wait', 'synchronize'))


_mode: TorchDispatchMode | None = None
_device: torch.device | None = None
_NEEDED = {
    '_setup_privateuseone_for_python_backend': torch.utils.backend_registration,
    '_set_only_lift_cpu_tensors': torch._C,
    '_make_wrapper_subclass': torch.Tensor,
}


def why_not() -> str | None:
    """Return what this torch lacks for a fake device; None: nothing."""
    lacking = [name for name, holder in _NEEDED.items() if not hasattr(holder, name)]
    return f"torch {torch.__version__} has no {' and no '.join(lacking)}" if lacking else None


def install() -> torch.device:
    """Register the device in this process, and return it."""
    global _mode, _device
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, _DeviceModule())
    _device = torch.device(NAME, 0)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes it on the host, and then copies
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _without_inference_tensors()
    _mode = _EverywhereOnTheDevice()
    _mode.__enter__()
    return _device


def _without_inference_tensors() -> None:
    """Let inference mode do what it says of gradients, and no more: a wrapper cannot become an inference tensor."""

    def enter(mode):
        mode.gradients = torch.set_grad_enabled(not mode.mode)
        mode.gradients.__enter__()

    torch.inference_mode.__enter__ = enter
    torch.inference_mode.__exit__ = lambda mode, *raised: mode.gradients.__exit__(*raised)


def is_there(value) -> bool:
    """Tell whether something is a tensor of the device."""
    return isinstance(value, DeviceTensor)


def _is_parameter(tensor) -> bool:
    return getattr(tensor, '_is_param', False)


def _execute(operation, args, kwargs):
    """Run an operation on the CPU, for both places; refuse to mix them, and tell what would be seen of the host."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(is_there(tensor) for tensor in tensors)
    if there:
        refuse_mixed(operation, tensors, is_there)
        note_waits(operation, args, kwargs, is_there)
    asked = kwargs.get('device')
    to_device = there if asked is None else torch.device(asked).type == _device.type
    note_copy(operation, args, to_device, is_there)
    if asked is not None:
        kwargs = {**kwargs, 'device': torch.device('cpu') if to_device else asked}
    if operation.overloadpacket in HALF_TO_FLOAT and args[2]:
        args = args[0].float(), args[1], False
    found = operation(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
    if not to_device:
        return found
    found = tree_map(lambda value: DeviceTensor(value) if isinstance(value, torch.Tensor) else value, found)
    return return_and_correct_aliasing(operation, args, kwargs, found)


def _on_host(value):
    return value.on_host if is_there(value) else value
