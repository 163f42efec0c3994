# SPDX-License-Identifier: Apache-2.0
"""Numbers to log that stay where they are. New in this project."""

import torch

Logs = dict[str, float | torch.Tensor]


def numbers_on_the_host(logs: Logs) -> dict[str, torch.Tensor]:
    """Make tensors of the host of the plain numbers among what is logged; float32, as Lightning's.

    Lightning copies each plain number that it is given to the model's device, and waits there until the copy is done:
    as many times in each step as there are such numbers. A tensor it takes as it is.
    """
    return {name: _tensor(value) for name, value in logs.items()}


def _tensor(value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(float(value), dtype=torch.float32)
