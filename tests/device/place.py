# SPDX-License-Identifier: Apache-2.0
"""Where, and in which precision, a scenario runs: on a device or on the CPU, in one dtype or under autocast."""

import copy
import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from device.host_traffic import unrecorded

PRECISIONS = {
    'float32': (torch.float32, None),
    'float16': (torch.float16, None),
    'autocast float16': (torch.float32, torch.float16),
    'autocast bfloat16': (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class Place:
    """A device and a precision."""

    device: torch.device
    precision: str = 'float32'

    def autocast(self):
        """Return the context to compute in."""
        dtype = PRECISIONS[self.precision][1]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    @unrecorded()
    def put(self, value):
        """Move a module, a tensor or a batch here, as a trainer does before a step; floats get the dtype of the place."""
        dtype = PRECISIONS[self.precision][0]
        if isinstance(value, torch.Tensor):
            return value.to(self.device, dtype if value.is_floating_point() else value.dtype)
        if dataclasses.is_dataclass(value):
            moved = copy.copy(value)
            for field in dataclasses.fields(value):
                setattr(moved, field.name, self.put(getattr(value, field.name)))
            return moved
        return value.to(self.device, dtype) if isinstance(value, torch.nn.Module) else value

    def random(self, *shape, seed: int = 0, requires_grad: bool = False) -> torch.Tensor:
        """Make normal random numbers here, the same on each device."""
        made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return self.put(made).requires_grad_(requires_grad)

    def whole(self, *numbers) -> torch.Tensor:
        """Make a tensor of whole numbers here, such as lengths."""
        return self.put(torch.tensor(numbers))


@unrecorded()
def plain(values) -> list:
    """Bring what a scenario returned to the CPU, detached, to be compared."""
    return [value.detach().cpu() if isinstance(value, torch.Tensor) else torch.tensor(value) for value in values]
