# SPDX-License-Identifier: Apache-2.0
"""ObjectiveMixin: what a config may ask for, and weights of one objective in a model of another."""

import pytest
import torch
from tiny_nest import tiny_config, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.objectives.combination import check_objective
from nemo.collections.asr.parts.objectives.next_tokens import HEADS
from nemo.collections.asr.parts.utils.config_keys import NextToken

NEXT, BOTH = '+model.objective=next_token', '+model.objective=both'


def test_a_weight_needs_another_loss():
    weight = '+model.next_token.weight=0.5'
    assert check_objective(tiny_config(BOTH, weight).model) == ('both', NextToken(weight=0.5))
    with pytest.raises(ValueError, match='model.next_token.weight is 0.5 with model.objective next_token'):
        check_objective(tiny_config(NEXT, weight).model)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="model.objective is 'nexttoken'; it must be one of .*next_token"):
        tiny_model('+model.objective=nexttoken')


@pytest.mark.parametrize('normalize', ['per_feature', 'all_features'])
@pytest.mark.parametrize('objective', ['next_token', 'both'])
def test_features_normalised_by_what_is_to_be_predicted_are_refused(objective, normalize):
    cfg = tiny_config(f'+model.objective={objective}', f'model.preprocessor.normalize={normalize}').model
    with pytest.raises(ValueError, match=f'model.preprocessor.normalize is {normalize}; .*must be NA or fixed'):
        check_objective(cfg)
    with pytest.raises(ValueError, match='depend on the next tokens'):
        EncDecDenoiseMaskedTokenPredModel(cfg)


def test_masked_is_the_default_and_adds_nothing():
    model = tiny_model()
    assert model.objective == 'masked' and model.next_token_decoders is None
    assert not [name for name in model.state_dict() if name.startswith(HEADS)]


def test_every_other_weight_is_the_same_whatever_the_objective():
    masked, both = tiny_model().state_dict(), tiny_model(BOTH).state_dict()
    assert {name for name in both if not name.startswith(HEADS)} == masked.keys()
    assert all(torch.equal(both[name], value) for name, value in masked.items())


def test_each_horizon_has_a_decoder_as_the_config_describes():
    model = tiny_model(BOTH, '+model.next_token.horizons=3', 'model.num_books=2', 'model.squeeze_single=false')
    assert len(model.next_token_decoders) == 3
    assert all(decoder.num_decoders == 2 for decoder in model.next_token_decoders)
    weights = [decoder.decoder_layers[0].weight for decoder in model.next_token_decoders]
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize('objective', ['next_token', 'both'])
def test_only_what_the_objective_trains_wants_a_gradient(objective):
    model = tiny_model(f'+model.objective={objective}', 'model.masking.freeze=false')
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.startswith('decoder.') for name in trained) == (objective == 'both')
    assert any(name.startswith('mask_processor.') for name in trained) == (objective == 'both')
    assert any(name.startswith(HEADS) for name in trained)


def test_weights_of_masked_prediction_load_into_the_other_objectives():
    masked, other = tiny_model(seed=1), tiny_model(NEXT, seed=2)
    heads = {name: value.clone() for name, value in other.state_dict().items() if name.startswith(HEADS)}
    other.load_state_dict(masked.state_dict())
    loaded = other.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in masked.state_dict().items())
    assert all(torch.equal(loaded[name], value) for name, value in heads.items())


def test_weights_of_next_token_prediction_load_into_masked_prediction():
    following, masked = tiny_model(NEXT, seed=1), tiny_model(seed=2)
    masked.load_state_dict(following.state_dict())
    assert all(torch.equal(value, following.state_dict()[name]) for name, value in masked.state_dict().items())


def test_horizons_that_both_have_are_kept():
    two = tiny_model(NEXT, '+model.next_token.horizons=2', seed=1)
    four = tiny_model(NEXT, seed=2)
    before = {name: value.clone() for name, value in four.state_dict().items()}
    four.load_state_dict(two.state_dict())
    for name, value in four.state_dict().items():
        expected = before if name.startswith((f'{HEADS}2', f'{HEADS}3')) else two.state_dict()
        assert torch.equal(value, expected[name]), name


def test_a_missing_weight_of_anything_else_is_still_an_error():
    state = tiny_model().state_dict()
    state.pop(next(name for name in state if name.startswith('encoder.')))
    with pytest.raises(RuntimeError, match='Missing key'):
        tiny_model(NEXT).load_state_dict(state)
