# SPDX-License-Identifier: Apache-2.0
"""What targets are made of is tested in ``test_ssl_models.py``, too."""

import numpy as np
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


def test_principal_components_of_features_that_are_normalised_otherwise_are_refused(tmp_path):
    file = tmp_path / 'pca.npz'
    arrays = dict(eigenvalues=np.ones(16), combine_time_steps=8, features=80, normalization='NA')
    np.savez(file, components=np.eye(640)[:16], **arrays)
    model = tiny_model('+model.quantizer.projection=pca', f"+model.quantizer.projection_file='{file}'")
    with pytest.raises(ValueError, match="^model.target_normalize is 'per_feature'; .* normalised by 'NA'"):
        fit(model, batches(1), 1)


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
