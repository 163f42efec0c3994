# SPDX-License-Identifier: Apache-2.0
"""A prepared linear layer computes what torch's does, whatever layout it reads."""

import pytest
import torch

from nemo.collections.asr.parts.streaming import linear
from nemo.collections.asr.parts.streaming.linear import LINEARS, PreparedLinear


@pytest.mark.parametrize('rows', [1, 2, 3, 40])
@pytest.mark.parametrize('size', [(32, 16), (512, 1024)])
@pytest.mark.parametrize('packs', [True, False])
@pytest.mark.parametrize('bias', [True, False])
def test_it_equals_torchs_for_any_number_of_rows(rows, size, packs, bias, monkeypatch):
    if not packs:
        monkeypatch.setattr(linear, 'can_pack', lambda: False)
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(*size, bias=bias), torch.randn(rows, size[0])
    prepared = PreparedLinear(layer.weight, layer.bias, 0.5)
    with torch.inference_mode():
        torch.testing.assert_close(prepared(inputs), layer(inputs) * 0.5, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_left_as_they_are(dtype):
    layer = torch.nn.Linear(512, 1024).to(dtype)
    inputs = torch.randn(2, 512).to(dtype)
    with torch.inference_mode():
        assert torch.equal(PreparedLinear(layer.weight, layer.bias)(inputs), layer(inputs))


@pytest.mark.parametrize('rows', [1, 40])
@pytest.mark.parametrize('size', [(32, 16), (512, 1024)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_relu_may_follow(rows, size, dtype):
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(*size).to(dtype), torch.randn(rows, size[0]).to(dtype)
    with torch.inference_mode():
        found = PreparedLinear(layer.weight, layer.bias, relu=True)(inputs)
        torch.testing.assert_close(found, layer(inputs).relu(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('precision, tolerance', [('bfloat16', 0.01), ('int8', 0.03)])
@pytest.mark.parametrize('packs', [True, False])
def test_smaller_weights_come_near(precision, tolerance, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(linear, 'can_pack', lambda: False)
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(64, 48), torch.randn(3, 64)
    with torch.inference_mode():
        found = LINEARS[precision](layer.weight, layer.bias)(inputs)
        assert found.dtype == torch.float32
        assert 0 < (found - layer(inputs)).norm() / layer(inputs).norm() < tolerance


@pytest.mark.parametrize('engine', torch.backends.quantized.supported_engines)
@pytest.mark.parametrize('bias', [True, False])
def test_an_int8_row_has_a_range_of_its_own_with_any_engine(engine, bias, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, 'engine', engine)
    torch.manual_seed(0)
    sizes = torch.tensor([[1e-4], [1.0], [1e4], [0.0], [1.0]])
    layer, inputs = torch.nn.Linear(64, 48, bias=bias), torch.randn(5, 64) * sizes
    inputs[4, 7] = torch.inf
    with torch.inference_mode():
        int8, exact = LINEARS['int8'](layer.weight, layer.bias), layer(inputs)
        found = int8(inputs)
        alone = torch.cat([int8(row[None]) for row in inputs[:3]])
        torch.testing.assert_close(found[:3], alone, rtol=0 if engine in ('x86', 'fbgemm') else 1e-4, atol=0)
        without = 0.0 if layer.bias is None else layer.bias
        assert ((found - exact)[:3].norm(dim=1) < 0.03 * (exact - without)[:3].norm(dim=1)).all()
        assert torch.equal(found[3], exact[3]) and not found[4].isfinite().any()
