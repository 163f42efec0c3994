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
PACKED_FOR = 16  # rows that oneDNN packs for; it takes any number


class PreparedLinear:
    """A linear layer of fixed weights, which are copied here; other layouts are made when they are first needed.

    Args:
        weight: [O, I], or [O, I, ...] of a pointwise convolution, any floating dtype and device.
        bias: [O] or None.
        scale: what weights and bias are multiplied by.
        relu: whether a ReLU follows.
        precision: one of ``PRECISIONS``; a smaller one than float32 is for float32 weights on a CPU, and rounds them:
            'bfloat16' weights and inputs; 'int8' weights, with a scale for each output, and inputs, with a range for
            each row.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: float = 1.0,
        relu: bool = False,
        precision: str = 'float32',
    ):
        weight = weight.detach().flatten(1) * scale
        self.bias, self.relu, self._layouts = None if bias is None else bias.detach() * scale, relu, {}
        self._packed_from, self._small, self._transposed = NEVER, None, None
        if precision != 'float32':
            self._small = _SMALL_WEIGHTS[precision](weight, self.bias)
            return
        self._chooses = chooses = weight.device.type == 'cpu' and weight.dtype == torch.float32
        if chooses and can_pack():
            self._packed_from = max(FEW + 1, -(-WORTH_PACKING // weight.numel()))
        if chooses and weight.numel() >= SMALL:
            self._transposed = weight.t().contiguous()
            weight = self._transposed.t()
        self.weight = weight

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [N, O] for rows [N, I], which have the dtype of the weights: a session switches autocast off."""
        if self._small is not None:
            outputs = self._small(rows)
            return outputs.relu_() if self.relu else outputs
        count = rows.shape[0]
        if count >= self._packed_from:
            weight, activation = self._layout('packed', self._pack), 'relu' if self.relu else 'none'
            return torch.ops.mkldnn._linear_pointwise(rows, weight, self.bias, activation, [], '')
        transposed = self._transposed
        if transposed is None and count == 1 and self._chooses:
            transposed = self._layout('transposed', lambda: self.weight.t().contiguous())
        if transposed is not None:
            outputs = rows @ transposed if self.bias is None else torch.addmm(self.bias, rows, transposed)
        else:
            outputs = F.linear(rows, self.weight, self.bias)
        return outputs.relu_() if self.relu else outputs

    def _layout(self, name: str, make) -> torch.Tensor:
        """Return the weights in another layout; two threads that make it at once make the same."""
        found = self._layouts.get(name)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self._layouts[name] = make()
        return found

    def _pack(self) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), PACKED_FOR)


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
    """A linear layer with int8 weights and inputs, by torch's own operators.

    torch's dynamic layers take one range for all rows. So each row is mapped to [-1, 1] by its own range, a row of 1 and
    -1 fixes the common one, and no row depends on another.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        largest = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        scales, zeros = (largest / 127).double(), torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # torch announces that a later release will not have these
            warnings.simplefilter('ignore')
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantised, None)
            self.sums = quantised.dequantize().sum(dim=1)
        self.bias = bias
        self._range = torch.ones(weight.shape[1])
        self._range[0] = -1.0

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        low, high = rows.aminmax(dim=1, keepdim=True)
        middle, half = (low + high) * 0.5, ((high - low) * 0.5).clamp_(min=torch.finfo(torch.float32).tiny)
        mapped = torch.empty(len(rows) + 1, rows.shape[1])
        torch.sub(rows, middle, out=mapped[:-1])
        mapped[:-1].div_(half).clamp_(-1.0, 1.0).nan_to_num_(0.0)  # a non-finite row stays so by its range
        mapped[-1] = self._range
        outputs = torch.ops.quantized.linear_dynamic(mapped, self.packed, True)[:-1]
        outputs = outputs.mul_(half).addcmul_(middle, self.sums)
        return outputs if self.bias is None else outputs.add_(self.bias)


_SMALL_WEIGHTS = {'bfloat16': _BFloat16, 'int8': _Int8}
PRECISIONS = 'float32', *_SMALL_WEIGHTS


def check_precision(precision: str, weight: torch.Tensor) -> None:
    """Raise ValueError if weights cannot be held in a precision, with the reason.

    Args:
        precision: requested.
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
