# SPDX-License-Identifier: Apache-2.0
"""What targets are made of is tested in ``test_ssl_models.py``, too."""

import pytest
import torch
from tiny_nest import batches, fit, noise_batch, tiny_model


def tokens_of_a_step(precision, *overrides):
    """Train a step, and return its targets."""
    model, made = tiny_model('model.preprocessor.dither=0', *overrides), []
    targets = model.targets.of
    model.targets.of = lambda *features: made.append(targets(*features)) or made[-1]
    fit(model, batches(1, (2.0, 1.0)), 1, precision=precision)
    return made[0][0]


@pytest.mark.parametrize('overrides', [(), ('model.target_normalize=NA',)], ids=['per_feature', 'NA'])
@pytest.mark.parametrize('precision', ['bf16-mixed', 'bf16-true'])
def test_tokens_are_the_same_in_any_precision(precision, overrides):
    assert torch.equal(tokens_of_a_step(precision, *overrides), tokens_of_a_step('32-true', *overrides))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_converted_model_keeps_the_modules_of_its_targets(dtype):
    model, plain = tiny_model().to(dtype).eval(), tiny_model().eval()
    for module in ('preprocessor', 'quantizer'):
        for (name, found), (_, expected) in zip(
            getattr(model, module).state_dict().items(), getattr(plain, module).state_dict().items(), strict=True
        ):
            assert torch.equal(found, expected), name
    batch = noise_batch()
    with torch.no_grad():
        records = [each.encode_batch(batch, None) for each in (model, plain)]
    assert torch.equal(records[0].tokens, records[1].tokens) and records[0].encoded.dtype == dtype
    assert model.double().quantizer.codebooks.dtype == torch.float64
