# SPDX-License-Identifier: Apache-2.0
"""Linear layers with copied weights, in the memory layout that is fastest for the number of rows.

On x86 CPUs, float32, oneDNN's products with packed weights take half the time of ``F.linear``, but some ten microseconds to
begin. Else a product with the transposed weights is never slower, and up to twice as fast for one row.

Shapes: N rows, I inputs, O outputs.
"""

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

FEW = 2  # rows for which the transposed weights are the fastest, whatever their size
SMALL = 2**16  # weights below which nothing is faster than F.linear for a few rows, but for one
NEVER = 2**62
WORTH_PACKING = 2**20  # multiplications for which packed weights are the faster ones
PACKED_FOR = 16  # rows that oneDNN packs for; it takes any number
POINTWISE: Any = getattr(getattr(torch.ops.mkldnn, '_linear_pointwise', None), 'default', None)  # found once


class PreparedLinear:
    """A linear layer or pointwise convolution: weights [O, I, ...], bias [O] times ``scale``."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: float = 1.0, relu: bool = False):
        self.weight, self.bias = _scaled(weight, bias, scale)
        self.relu, self._packed_from = relu, NEVER
        self._chooses = self.weight.device.type == 'cpu' and self.weight.dtype == torch.float32
        self._is_large = self.weight.numel() >= SMALL
        if self._chooses:
            self._transposed = self.weight.t().contiguous()
            self.weight = self._transposed.t() if self._is_large else self.weight
            if can_pack():
                self._packed_from = max(FEW + 1, -(-WORTH_PACKING // self.weight.numel()))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, O] for rows [N, I], which have the dtype of the weights: a session switches autocast off."""
        count = rows.shape[0]
        if count >= self._packed_from:
            return POINTWISE(rows, self._packed, self.bias, 'relu' if self.relu else 'none', [], '')
        if not self._chooses or (count > 1 and not self._is_large):
            outputs = F.linear(rows, self.weight, self.bias)
        elif self.bias is None:
            outputs = rows @ self._transposed
        else:
            outputs = torch.addmm(self.bias, rows, self._transposed)
        return outputs.relu_() if self.relu else outputs

    @cached_property
    def _packed(self) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), PACKED_FOR)


class BFloat16Linear(PreparedLinear):
    """The same in bfloat16, packed if torch supports it; float32 weights on a CPU."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: float = 1.0):
        super().__init__((weight * scale).bfloat16(), None if bias is None else (bias * scale).bfloat16())
        if can_pack():
            self._packed_from, self.weight = 0, self._packed  # no other layout is read

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, O] float32 for rows [N, I] float32."""
        return super().__call__(rows.bfloat16()).float()


class Int8Linear:
    """The same in int8 by torch's operators, with weights scaled by output; float32 weights on a CPU.

    They take one range for all rows. So each row is divided by its own largest value, and the range is -1 to 1.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: float = 1.0):
        weight, bias = _scaled(weight, bias, scale)
        self.bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        largest = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        scales, zeros = (largest / 127).double(), torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # torch announces that a later release will not have these
            warnings.simplefilter('ignore')
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(quantised, None)
        self._range, self._ends = None, weight.new_tensor([[-1.0], [1.0]]).expand(2, weight.shape[1])
        if torch.backends.quantized.engine in ('x86', 'fbgemm'):  # called without torch's search for fake arguments
            self._in_range = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op
            steps = 127 if torch.cpu.get_capabilities().get('avx512_vnni') else 63  # else sums of two have 16 bits
            self._range = 1 / steps, steps + 1, self._packed

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, O] for rows [N, I]."""
        largest = rows.abs().amax(dim=1, keepdim=True)
        inputs = rows / largest  # NaN in a row of zeros, whose outputs are 0 times any number
        if self._range is not None:
            return torch.addcmul(self.bias, self._in_range(inputs, *self._range), largest)
        inputs = torch.cat((inputs.nan_to_num_(0.0), self._ends))  # other engines find the range
        return torch.addcmul(self.bias, torch.ops.quantized.linear_dynamic(inputs, self._packed, True)[:-2], largest)


LINEARS = {'float32': PreparedLinear, 'bfloat16': BFloat16Linear, 'int8': Int8Linear}


def linear_in(precision: str, weight: torch.Tensor, *bias_and_scale: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a linear layer in one of ``LINEARS``; small weights stay as they are, which is faster."""
    return LINEARS[precision if weight.numel() >= SMALL else 'float32'](weight, *bias_and_scale)


def check_precision(precision: str, weight: torch.Tensor) -> None:
    """Raise ValueError, with the reason, if weights like this one cannot be held in a precision."""
    if precision not in LINEARS:
        raise ValueError(f"weights is {precision!r}; it must be one of {[*LINEARS]}")
    found = weight.device.type, weight.dtype
    if precision != 'float32' and found != ('cpu', torch.float32):
        raise ValueError(f"weights is {precision!r}, which is for float32 models on a CPU; this one is {found}")


def can_pack() -> bool:
    """Return whether this torch has oneDNN's packed weights."""
    names = ('_linear_pointwise', '_reorder_linear_weight')
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _scaled(weight: torch.Tensor, bias: torch.Tensor | None, scale: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight.detach().flatten(1) * scale, None if bias is None else bias.detach() * scale
