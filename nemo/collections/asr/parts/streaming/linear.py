# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Linear layers whose weights lie in memory as the kernel for so much work reads them fastest.

Measured on x86 CPUs, float32: oneDNN's products with packed weights take half the time of ``F.linear``, but some ten
microseconds to begin; where they do not pay, a product with the transposed weights is never slower than ``F.linear``, and up
to twice as fast for one row. Elsewhere (other devices, other dtypes) it is ``F.linear``.

Shapes: N rows, I inputs, O outputs.
"""

from typing import Optional

import torch
import torch.nn.functional as F

FEW = 2  # rows for which the transposed weights are the fastest, whatever their size
SMALL = 2**16  # weights below which nothing is faster than F.linear for few rows
NEVER = 2**62
WORTH_PACKING = 2**20  # multiplications for which packed weights are the faster ones
PACKED_FOR = 16  # rows that oneDNN is told of when it packs; it takes any number


class PreparedLinear:
    """A linear layer of fixed weights; copies in other layouts are made when they are first needed.

    Args:
        weight: [O, I], or [O, I, ...] of a pointwise convolution, any floating dtype and device.
        bias: [O] or None.
        scale: what weights and bias are multiplied by.
        relu: whether a ReLU follows.
    """

    def __init__(
        self, weight: torch.Tensor, bias: Optional[torch.Tensor] = None, scale: float = 1.0, relu: bool = False
    ):
        weight = weight.detach().flatten(1)
        bias = None if bias is None else bias.detach()
        if scale != 1.0:
            weight, bias = weight * scale, None if bias is None else bias * scale
        self.weight, self.bias, self.relu = weight.contiguous(), bias, relu
        self._layouts: dict = {}
        chooses = weight.device.type == 'cpu' and weight.dtype == torch.float32
        self._transposes = chooses and weight.numel() >= SMALL
        self._packed_from = NEVER  # rows
        if chooses and can_pack():
            self._packed_from = max(FEW + 1, -(-WORTH_PACKING // weight.numel()))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, O] for rows [N, I], which have the dtype of the weights: a session switches autocast off."""
        if rows.shape[0] >= self._packed_from:
            weight, activation = self._layout('packed', self._pack), 'relu' if self.relu else 'none'
            return torch.ops.mkldnn._linear_pointwise(rows, weight, self.bias, activation, [], '')
        if self._transposes:
            weight = self._layout('transposed', lambda: self.weight.t().contiguous())
            outputs = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)
        else:
            outputs = F.linear(rows, self.weight, self.bias)
        return outputs.relu_() if self.relu else outputs

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
