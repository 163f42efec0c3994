# SPDX-License-Identifier: Apache-2.0
"""What autocast does on a device of torch's PrivateUse1 kind, which has no rules by itself: the main ones of CUDA."""

import torch
from torch.utils._pytree import tree_map

aten = torch.ops.aten
KEY = 'AutocastPrivateUse1'
IN_LOWER_PRECISION = (
    'linear matmul mm bmm addmm baddbmm addbmm conv1d.default conv2d.default conv3d.default convolution '
    'scaled_dot_product_attention'.split()
)
IN_FLOAT32 = (
    'softmax.int log_softmax.int layer_norm norm.Scalar norm.ScalarOpt_dim exp log log1p pow.Tensor_Scalar rsqrt sum '
    'sum.dim_IntList cumsum prod nll_loss'.split()
)

_libraries = []  # the end of one would take its rules away


def register_autocast() -> None:
    """Register the rules in this process, once; operations without a rule stay as they are."""
    library, others = torch.library.Library('aten', 'IMPL'), torch.library.Library('_', 'IMPL')
    _libraries.extend((library, others))
    others.fallback(torch.library.fallthrough_kernel, KEY)
    for names, to_dtype in ((IN_LOWER_PRECISION, _lower), (IN_FLOAT32, lambda: torch.float32)):
        for name in names:
            packet, _, overload = name.partition('.')
            operation = getattr(getattr(aten, packet), overload or 'default')
            library.impl(operation, _casting(operation, to_dtype), KEY)


def _lower() -> torch.dtype:
    return torch.get_autocast_dtype(torch._C._get_privateuse1_backend_name())


def _casting(operation, to_dtype):
    """Return the operation on what is cast before."""

    def cast(value, dtype):
        casts = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if casts else value

    def run(*args, **kwargs):
        dtype = to_dtype()
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C._parse_dispatch_key(KEY))):
            return operation(*tree_map(lambda value: cast(value, dtype), args), **kwargs)

    return run
