# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Linear layers whose weights lie in memory as the kernel for so many rows reads them fastest.

A live stream has one row, or a row for each stream; its time is that of reading the weights. Measured on x86 CPUs, float32:
for one or two rows a matrix product with the transposed weights beats ``F.linear``, for more oneDNN's packed weights do, and
in small layers nothing does. Elsewhere (other devices, other dtypes, a torch without the operator) it is ``F.linear``.

Shapes: N rows, I inputs, O outputs.
"""

from typing import Optional

import torch
import torch.nn.functional as F

LARGE = 512 * 512  # weights of a layer that is worth another layout
FEW = 2  # rows up to which the transposed weights are the fastest
PACKED_FOR = 16  # rows that oneDNN is told of when it packs; it takes any number


class PreparedLinear:
    """A linear layer of fixed weights; copies in other layouts are made when they are first needed.

    Args:
        weight: [O, I], or [O, I, 1] of a pointwise convolution, any floating dtype and device.
        bias: [O] or None.
        scale: what weights and bias are multiplied by.
    """

    def __init__(self, weight: torch.Tensor, bias: Optional[torch.Tensor] = None, scale: float = 1.0):
        weight = weight.detach().flatten(1)
        bias = None if bias is None else bias.detach()
        if scale != 1.0:
            weight, bias = weight * scale, None if bias is None else bias * scale
        self.weight, self.bias = weight.contiguous(), bias
        self._layouts: dict = {}
        cpu = weight.device.type == 'cpu' and weight.dtype == torch.float32
        self._chooses = cpu and weight.numel() >= LARGE
        self._packs = self._chooses and can_pack()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, O] for rows [N, I]."""
        if not self._chooses:
            return F.linear(rows, self.weight, self.bias)
        if rows.shape[0] <= FEW:
            weight = self._layout('transposed', lambda: self.weight.t().contiguous())
            return rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)
        if not self._packs:
            return F.linear(rows, self.weight, self.bias)
        weight = self._layout('packed', self._pack)
        return torch.ops.mkldnn._linear_pointwise(rows, weight, self.bias, 'none', [], '')

    def _layout(self, name: str, make) -> torch.Tensor:
        """Return a copy of the weights; two threads that make it at once make the same."""
        found = self._layouts.get(name)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self._layouts[name] = make()
        return found

    def _pack(self) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR)


def can_pack() -> bool:
    """Return whether this torch has oneDNN's packed weights."""
    names = ('_linear_pointwise', '_reorder_linear_weight')
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
