# SPDX-License-Identifier: Apache-2.0
"""CPU scalars for the trainer's logs."""

import torch

Logs = dict[str, float | torch.Tensor]


def cpu_scalars(logs: Logs) -> dict[str, torch.Tensor]:
    """Return logs with a float32 tensor on the CPU for each plain number; tensors stay as they are.

    Lightning copies each plain number to the model's device, which synchronises it with the host.
    """
    return {
        name: value if isinstance(value, torch.Tensor) else torch.tensor(float(value), dtype=torch.float32)
        for name, value in logs.items()
    }
