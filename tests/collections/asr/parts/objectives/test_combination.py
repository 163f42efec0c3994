# SPDX-License-Identifier: Apache-2.0
"""What a config may ask for, and weights of one objective in a model of another."""

import pytest
import torch
from tiny_nest import tiny_config, tiny_model

from nemo.collections.asr.parts.objectives.combination import check_objective
from nemo.collections.asr.parts.objectives.next_tokens import HEADS
from nemo.collections.asr.parts.utils.config_keys import NextToken

NEXT, BOTH = '+model.objective=next_token', '+model.objective=both'


def test_a_weight_needs_another_loss():
    weight = '+model.next_token.weight=0.5'
    assert check_objective(tiny_config(BOTH, weight).model) == ('both', NextToken(weight=0.5))
    with pytest.raises(ValueError, match='model.next_token.weight is 0.5 with model.objective next_token'):
        check_objective(tiny_config(NEXT, weight).model)


@pytest.mark.parametrize('normalize', ['per_feature', 'all_features'])
@pytest.mark.parametrize('objective', [NEXT, BOTH])
def test_features_normalised_by_what_is_to_be_predicted_are_refused(objective, normalize):
    with pytest.raises(ValueError, match=f'model.preprocessor.normalize is {normalize}; .*must be NA or fixed'):
        tiny_model(objective, f'model.preprocessor.normalize={normalize}')


def test_every_other_weight_is_the_same_whatever_the_objective_and_loads():
    masked, both = tiny_model(), tiny_model(BOTH)
    weights, heads = masked.state_dict(), {name for name in both.state_dict() if name.startswith(HEADS)}
    assert both.state_dict().keys() - heads == weights.keys() and masked.next_token_decoders is None
    assert all(torch.equal(both.state_dict()[name], value) for name, value in weights.items())
    other = tiny_model(BOTH, seed=1)
    masked.load_state_dict(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in masked.state_dict().items())


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


@pytest.mark.parametrize('given', [(NEXT, '+model.next_token.horizons=2'), ()], ids=['two', 'none'])
def test_horizons_that_both_have_are_taken_over_and_others_stay(given):
    two = tiny_model(*given, seed=1)
    four = tiny_model(NEXT, seed=2)
    before = {name: value.clone() for name, value in four.state_dict().items()}
    four.load_state_dict(two.state_dict())
    for name, value in four.state_dict().items():
        assert torch.equal(value, two.state_dict().get(name, before[name])), name


def test_a_missing_weight_of_anything_else_is_still_an_error():
    state = tiny_model().state_dict()
    state.pop(next(name for name in state if name.startswith('encoder.')))
    with pytest.raises(RuntimeError, match='Missing key'):
        tiny_model(NEXT).load_state_dict(state)
