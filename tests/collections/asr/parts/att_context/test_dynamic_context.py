# SPDX-License-Identifier: Apache-2.0
import copy
from functools import partial

import pytest
import torch
from omegaconf import ListConfig
from spies import recording_contexts
from tiny_nest import POSITIONS, noise_batch, signals, tiny_model

from nemo.collections.asr.models.ssl_models import (
    EncDecDenoiseMaskedTokenPredModel,
    EncDecMaskedTokenPredModel,
    SpeechEncDecSelfSupervisedModel,
)
from nemo.collections.asr.parts.att_context import (
    PRESETS,
    AttContext,
    DynamicContextModel,
    EnhancedDynamicContextModel,
    set_dynamic_context,
    sync_masking_to_attention,
)

ALL_PRESETS = 'model.encoder.att_context_size=[[80,0],[160,0],[240,0],[320,0],[-1,0]]'
LAYERS = ('model.encoder.n_layers=2', '+model.encoder.layer_att_context_size=[[40,0],[120,0]]')
INPUTS = {
    80: [[80, 0], (80, 0), ListConfig([80, 0]), 80, 'very_low', AttContext(80, 0)],
    160: ['low', [160, 0]],
    320: [320, 'high'],
    -1: ['unlimited', (-1, 0), -1],
}


def by_attribute(model, context):
    DynamicContextModel(model).att_context_size = context


def by_set_context(model, context):
    EnhancedDynamicContextModel(model).set_context(context)


WAYS = pytest.mark.parametrize('way', [set_dynamic_context, by_attribute, by_set_context])


@WAYS
@POSITIONS
@pytest.mark.parametrize('layers', [(), LAYERS], ids=['plain', 'hierarchical'])
def test_attention_and_masking_agree_in_attention_frames(way, position, layers):
    model = tiny_model(ALL_PRESETS, *position, *layers)
    for left, values in INPUTS.items():
        expected = 40 if layers else left
        for value in values:
            way(model, value)
            assert model.encoder.att_context_size == [left, 0]
            assert sync_masking_to_attention(model) == expected == model.mask_processor.left_context_size
        with recording_contexts(model) as record:
            model(**signals(noise_batch((0.6, 0.4))), apply_mask=True)
        assert record.masking == [expected]
        widest = 120 if layers and not 0 < left < 120 else left
        assert sorted(record.attention) == sorted([[40, 0], [widest, 0]] if layers else [[left, 0]])
    with model.encoder.using_att_context_size([20, 0]):
        assert sync_masking_to_attention(model) == 20


def test_models_without_contexts_are_refused():
    other = torch.nn.Linear(1, 1)
    set_context = partial(set_dynamic_context, context=80)
    for entry in (DynamicContextModel, EnhancedDynamicContextModel, set_context, sync_masking_to_attention):
        with pytest.raises(ValueError, match='Linear takes no context'):
            entry(other)
    model = tiny_model()
    model.mask_processor = torch.nn.Identity()
    with pytest.raises(ValueError, match='Identity, takes no context'):
        sync_masking_to_attention(model)
    del model.mask_processor
    with pytest.raises(ValueError, match='NoneType, takes no context'):
        sync_masking_to_attention(model)
    contrastive = EnhancedDynamicContextModel(tiny_model(cls=SpeechEncDecSelfSupervisedModel))
    with pytest.raises(ValueError, match='SpeechEncDecSelfSupervisedModel does not'):
        contrastive.process(torch.zeros(1, 1600), torch.tensor([1600]))


def test_the_wrapper_is_the_model_in_all_else():
    model = tiny_model()
    wrapper = DynamicContextModel(model)
    wrapper.att_context_size = [20, 0]
    assert wrapper.att_context_size == [20, 0] and wrapper.mask_processor.left_context_size == 20
    assert wrapper.cfg is model.cfg and wrapper.eval() is model and not model.training
    wrapper.some_setting = 7
    assert model.some_setting == 7
    batch = noise_batch((0.6, 0.4))
    assert torch.equal(wrapper(**signals(batch))[0], model(**signals(batch))[0])
    assert copy.copy(wrapper).model is model


def test_presets_are_listed_extended_and_checked():
    wrapper = EnhancedDynamicContextModel(tiny_model(), presets={'tiny': [20, 0], 'low': 10})
    assert wrapper.context_presets == {
        **{name: list(context) for name, context in PRESETS.items()},
        **{'low': [10, 0], 'tiny': [20, 0]},
    }
    wrapper.context_presets['small'] = 40
    for name, left in (('tiny', 20), ('low', 10), ('small', 40)):
        wrapper.att_context_size = name
        assert wrapper.att_context_size == [left, 0] and wrapper.mask_processor.left_context_size == left
    del wrapper.context_presets['tiny']
    with pytest.raises(ValueError, match="'tiny'; known are very_low, low, medium, high, unlimited, small"):
        wrapper.set_context(mode_or_context='tiny')
    wrapper.context_presets['low'] = [-3, 0]
    with pytest.raises(ValueError, match=r"context_presets\['low'\]: the left context is -3"):
        wrapper.set_context('low')
    with pytest.raises(ValueError, match=r"presets\['wrong'\]: the left context is -3"):
        EnhancedDynamicContextModel(tiny_model(), presets={'wrong': [-3, 0]})
    assert EnhancedDynamicContextModel(tiny_model()).context_presets['low'] == [160, 0]


@POSITIONS
def test_a_temporary_context(position):
    wrapper = EnhancedDynamicContextModel(tiny_model(*position), presets={'tiny': [20, 0]})
    with wrapper.using_context('tiny') as inside:
        assert inside is wrapper and wrapper.att_context_size == [20, 0]
        with pytest.raises(RuntimeError), wrapper.using_context(40):
            assert wrapper.mask_processor.left_context_size == 40
            raise RuntimeError
        assert wrapper.att_context_size == [20, 0] and wrapper.mask_processor.left_context_size == 20
    assert wrapper.att_context_size == [10, 0] and wrapper.mask_processor.left_context_size == 10


@POSITIONS
@pytest.mark.parametrize('cls', [EncDecDenoiseMaskedTokenPredModel, EncDecMaskedTokenPredModel])
def test_inference_returns_what_forward_returns_in_the_context_without_masks(position, cls):
    wrapper = EnhancedDynamicContextModel(tiny_model(*position, cls=cls))
    wrapper.train()
    wrapper.decoder.eval()  # frozen, say
    batch, outputs = noise_batch((3.0, 2.0)), {}
    for context in (20, 2):
        with wrapper.using_context(context), recording_contexts(wrapper.model) as record:
            processed = outputs[context] = wrapper.process(batch.audio, batch.audio_len)
        assert record.masking == [] and record.attention == [[context, 0]]
        assert not processed.encoded.requires_grad and wrapper.training and not wrapper.decoder.training
    assert not torch.equal(outputs[2].encoded, outputs[20].encoded)
    log_probs, encoded_lengths, masks, tokens = processed
    with wrapper.using_context(2), torch.no_grad():
        expected = wrapper.eval()(input_signal=batch.audio, input_signal_length=batch.audio_len, apply_mask=False)
    assert all(map(torch.equal, processed, expected)) and not masks.any()
    assert encoded_lengths is processed.encoded_lengths and tokens is processed.tokens
    assert torch.equal(wrapper.decoder(encoder_output=processed.encoded), log_probs)
    assert not wrapper.encoder._forward_hooks
