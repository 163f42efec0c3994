# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weights lie in memory as the kernel for so much work reads them fastest.

Measured on x86 CPUs, float32: oneDNN's products with packed weights take half the time of ``F.linear``, but some ten
microseconds to begin; where they do not pay, a product with the transposed weights is never slower than ``F.linear``, and up
to twice as fast for one row. Elsewhere (other devices, other dtypes) it is ``F.linear``.

Shapes: N rows, I inputs, O outputs.
"""

import warnings

import torch
import torch.nn.functional as F

FEW = 2  # rows for which the transposed weights are the fastest, whatever their size
SMALL = 2**16  # weights below which nothing is faster than F.linear for a few rows, but for one
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
        precision: one of ``PRECISIONS``; a smaller one than float32 is for float32 weights on a CPU, and rounds them:
            'bfloat16' weights and inputs; 'int8' weights, a scale for each output, and inputs, a scale for each call.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: float = 1.0,
        relu: bool = False,
        precision: str = 'float32',
    ):
        weight = weight.detach().flatten(1)
        bias = None if bias is None else bias.detach()
        if scale != 1.0:
            weight, bias = weight * scale, None if bias is None else bias * scale
        self.weight, self.bias, self.relu = weight.contiguous(), bias, relu
        self._layouts: dict = {}
        self._chooses = chooses = weight.device.type == 'cpu' and weight.dtype == torch.float32
        self._transposes = chooses and weight.numel() >= SMALL
        self._packed_from = NEVER  # rows
        if chooses and can_pack():
            self._packed_from = max(FEW + 1, -(-WORTH_PACKING // weight.numel()))
        self._small = None
        if precision != 'float32':
            with torch.inference_mode(False), torch.no_grad():
                self._small = _SMALL_WEIGHTS[precision](self.weight, self.bias)
            self.weight = self.bias = None  # kept in the small precision only

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, O] for rows [N, I], which have the dtype of the weights: a session switches autocast off."""
        if self._small is not None:
            outputs = self._small(rows)
            return outputs.relu_() if self.relu else outputs
        count = rows.shape[0]
        if count >= self._packed_from:
            weight, activation = self._layout('packed', self._pack), 'relu' if self.relu else 'none'
            return torch.ops.mkldnn._linear_pointwise(rows, weight, self.bias, activation, [], '')
        if self._transposes or (count == 1 and self._chooses):
            weight = self._layouts.get('transposed')
            if weight is None:
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


class _BFloat16:
    """A linear layer in bfloat16, packed where torch can."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
        self._packs = can_pack()
        if self._packs:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.bfloat16()
        if not self._packs:
            return F.linear(rows, self.weight, self.bias).float()
        return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, 'none', [], '').float()


class _Int8:
    """A linear layer with int8 weights, whose inputs are quantised as they come, by torch's own operators."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        largest = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        scales, zeros = (largest / 127).double(), torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # torch says that a later release will not have these
            warnings.simplefilter('ignore')
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantised, bias)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic(rows.contiguous(), self.packed, True)


_SMALL_WEIGHTS = {'bfloat16': _BFloat16, 'int8': _Int8}
PRECISIONS = 'float32', *_SMALL_WEIGHTS


def check_precision(precision: str, weight: torch.Tensor) -> None:
    """Raise ValueError if weights cannot be held in a precision, with the reason.

    Args:
        precision: asked for.
        weight: one of the weights.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"weights is {precision!r}; it must be one of {PRECISIONS}")
    if precision == 'float32':
        return
    if weight.device.type != 'cpu' or weight.dtype != torch.float32:
        raise ValueError(
            f"weights is {precision!r}, which is for float32 models on a CPU; this one is {weight.dtype} on {weight.device}"
        )
    if precision == 'int8' and not hasattr(torch.ops.quantized, 'linear_dynamic'):
        raise ValueError(f"weights is 'int8'; torch {torch.__version__} has no dynamic int8 linear layers")


def can_pack() -> bool:
    """Return whether this torch has oneDNN's packed weights."""
    names = ('_linear_pointwise', '_reorder_linear_weight')
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
