# SPDX-License-Identifier: Apache-2.0
"""Where stock NeMo works, the patched modules give its results; stock runs in a process of its own."""

import json
import sys
from pathlib import Path

import pytest
import stock_cases
import torch
from fresh_process import run_python

# NeMo's own failures, in all versions: its subsampling passes no lengths there, or takes one number for two.
FAIL_IN_STOCK = {'vggnet', 'striding_conv1d', 'dw_striding_conv1d', 'unchunked subsampling'}
# NeMo gives the subsampling of the clean features an axis in the wrong place; mended.
MENDED = {'EncDecDenoiseMaskedTokenPredModel, post_conv'}
OUTPUTS, GRADIENTS = 1e-6, 1e-5  # relative to the largest value, where sums are taken in another order


@pytest.fixture(scope='module')
def stock(tmp_path_factory):
    """What stock NeMo computes, {case: {name: tensor}}."""
    saved = tmp_path_factory.mktemp('stock') / 'results.pt'
    done = run_python(stock_cases.__file__, saved, patched=False)
    assert done.returncode == 0, done.stderr[-3000:]
    encoder = Path(json.loads(Path(f'{saved}.json').read_text())['encoder'])
    assert encoder.parts[-5:-1] == ('nemo', 'collections', 'asr', 'modules')
    assert encoder != Path(sys.modules[stock_cases._encoder_class().__module__].__file__)
    return torch.load(saved)


@pytest.mark.integration
def test_every_case_gives_stocks_results(stock):
    patched = stock_cases.compute_all()
    assert patched.keys() == stock.keys() and len(stock) > 110
    differences = [
        f'{case}: {difference}'
        for case in stock
        if case not in MENDED
        for difference in differences_of(stock[case], patched[case], exact=stock_cases.is_computed_alike(case))
    ]
    assert not differences, '\n'.join(differences[:40])
    failing = {case for case, results in stock.items() if has_failed(results)}
    assert failing == MENDED | {f'{kind}: {name}' for name in FAIL_IN_STOCK for kind in stock_cases.KINDS}
    assert not [case for case in MENDED if has_failed(patched[case])]


def has_failed(results) -> bool:
    return any(name.startswith('fails') for name in results)


def differences_of(expected, found, exact: bool):
    """Yield what differs between two sets of results, in words."""
    if expected.keys() != found.keys():
        yield f'{sorted(expected.keys() ^ found.keys())[:3]} only in one'
        return
    for name, values in expected.items():
        if values.shape != found[name].shape or values.dtype != found[name].dtype:
            yield f'{name}: {values.dtype} {tuple(values.shape)}, {found[name].dtype} {tuple(found[name].shape)}'
        elif not torch.equal(values, found[name]):
            scale = values.double().abs().max().clamp(min=1)
            largest = ((values.double() - found[name].double()).abs().max() / scale).item()
            allowed = 0 if exact else GRADIENTS if name.startswith('gradient') else OUTPUTS
            if not largest <= allowed:
                yield f'{name} differs by {largest:.1e}'
