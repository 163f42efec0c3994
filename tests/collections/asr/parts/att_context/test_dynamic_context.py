# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from omegaconf import ListConfig
from spies import recording_contexts
from tiny_nest import POSITIONS, noise_batch, signals, tiny_model

from nemo.collections.asr.models import ssl_models
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
ENCODERS = pytest.mark.parametrize('layers', [(), LAYERS], ids=['plain', 'hierarchical'])
MASKING = {'plain': {80: 80, 160: 160, 320: 320, -1: -1}, 'hierarchical': {80: 40, 160: 40, 320: 40, -1: 40}}
INPUTS = {
    80: [[80, 0], (80, 0), ListConfig([80, 0]), 80, 'very_low', AttContext(80, 0)],
    160: ['low', [160, 0]],
    320: [320, 'high'],
    -1: ['unlimited', (-1, 0), -1],
}


def by_function(model, context):
    set_dynamic_context(model, context)


def by_attribute(model, context):
    DynamicContextModel(model).att_context_size = context


def by_set_context(model, context):
    EnhancedDynamicContextModel(model).set_context(context)


WAYS = pytest.mark.parametrize('way', [by_function, by_attribute, by_set_context])


def mask(model):
    """Run a masked forward pass."""
    batch = noise_batch((0.6, 0.4))
    return model(**signals(batch), apply_mask=True)


@WAYS
@POSITIONS
@ENCODERS
def test_attention_and_masking_agree_in_attention_frames(way, position, layers):
    model = tiny_model(ALL_PRESETS, *position, *layers)
    expected = MASKING['hierarchical' if layers else 'plain']
    for left, values in INPUTS.items():
        for value in values:
            way(model, value)
            assert model.encoder.att_context_size == [left, 0]
            assert model.mask_processor.left_context_size == expected[left]
        with recording_contexts(model) as record:
            mask(model)
        assert record.masking == [expected[left]]
        widest = 120 if layers and not 0 < left < 120 else left
        assert sorted(record.attention) == sorted([[40, 0], [widest, 0]] if layers else [[left, 0]])


@POSITIONS
@ENCODERS
def test_masking_follows_changes_of_the_encoder(position, layers):
    model = tiny_model(ALL_PRESETS, *position, *layers)
    for left, masking in MASKING['hierarchical' if layers else 'plain'].items():
        model.encoder.set_default_att_context_size([left, 0])
        assert sync_masking_to_attention(model) == masking == model.mask_processor.left_context_size
    with model.encoder.using_att_context_size([20, 0]):
        assert sync_masking_to_attention(model) == 20
    model.encoder.layers[0].self_attention.att_context_size = [8, 0]
    assert sync_masking_to_attention(model) == 8


@WAYS
@pytest.mark.parametrize(
    'bad, message',
    [
        ('lowest', "'lowest'; known are very_low, low, medium, high, unlimited"),
        ([1, 2, 3], 'is no context'),
        ([80, -2], 'right context is -2'),
        (object(), 'is no context'),
    ],
)
def test_what_is_no_context_is_refused(way, bad, message):
    with pytest.raises(ValueError, match=message):
        way(tiny_model(), bad)


def test_models_without_contexts_are_refused():
    other = torch.nn.Linear(1, 1)
    for entry in (DynamicContextModel, EnhancedDynamicContextModel, lambda model: set_dynamic_context(model, 80)):
        with pytest.raises(ValueError, match='Linear takes no context'):
            entry(other)
    with pytest.raises(ValueError, match='Linear has no encoder'):
        sync_masking_to_attention(other)
    model = tiny_model()
    model.mask_processor = torch.nn.Identity()
    with pytest.raises(ValueError, match='Identity, takes no context'):
        sync_masking_to_attention(model)


def test_the_wrapper_is_the_model_in_all_else():
    model = tiny_model()
    wrapper = DynamicContextModel(model)
    wrapper.att_context_size = [20, 0]
    assert wrapper.att_context_size == [20, 0]
    assert wrapper.cfg is model.cfg and wrapper.eval() is model and not model.training
    wrapper.some_setting = 7
    assert model.some_setting == 7
    del wrapper.some_setting
    assert not hasattr(model, 'some_setting') and not hasattr(wrapper, 'some_setting')
    assert 'save_to' in dir(wrapper) and wrapper.state_dict().keys() == model.state_dict().keys()
    torch.manual_seed(1)
    called = mask(wrapper)
    torch.manual_seed(1)
    assert torch.equal(called[0], mask(model)[0])
    assert repr(wrapper) == (
        'DynamicContextModel(EncDecDenoiseMaskedTokenPredModel: attention [20, 0], masking 20, '
        'configured contexts [10, 0], [20, 0], [40, 0], [-1, 0])'
    )
    assert copy.copy(wrapper).model is model


def test_presets_are_listed_extended_and_checked():
    wrapper = EnhancedDynamicContextModel(tiny_model(), presets={'tiny': [20, 0], 'low': 10})
    assert wrapper.context_presets == {
        'very_low': [80, 0],
        'low': [10, 0],
        'medium': [240, 0],
        'high': [320, 0],
        'unlimited': [-1, 0],
        'tiny': [20, 0],
    }
    assert EnhancedDynamicContextModel(tiny_model()).context_presets == {
        name: list(context) for name, context in PRESETS.items()
    }
    wrapper.set_context('tiny')
    assert wrapper.att_context_size == [20, 0] and wrapper.mask_processor.left_context_size == 20
    wrapper.att_context_size = 'low'
    assert wrapper.att_context_size == [10, 0]
    assert 'attention [10, 0], masking 10' in repr(wrapper) and 'tiny [20, 0]' in repr(wrapper)
    with pytest.raises(ValueError, match="'small'; known are very_low, low, medium, high, unlimited, tiny"):
        wrapper.set_context('small')
    with pytest.raises(ValueError, match=r"presets\['wrong'\]: the left context is -3"):
        EnhancedDynamicContextModel(tiny_model(), presets={'wrong': [-3, 0]})
    wrapper.set_context(mode_or_context='tiny')
    assert wrapper.att_context_size == [20, 0]


def test_presets_can_be_set_and_taken_away():
    wrapper = EnhancedDynamicContextModel(tiny_model())
    wrapper.context_presets['tiny'] = [20, 0]
    wrapper.context_presets.update(small=40, same='tiny')
    for name, left in (('tiny', 20), ('small', 40), ('same', 20)):
        wrapper.set_context(name)
        assert wrapper.att_context_size == [left, 0] == wrapper.context_presets[name]
        with wrapper.using_context(name):
            assert wrapper.mask_processor.left_context_size == left
    del wrapper.context_presets['tiny']
    assert list(wrapper.context_presets) == [*PRESETS, 'small', 'same'] and 'tiny' not in repr(wrapper)
    with pytest.raises(ValueError, match="'tiny'; known are very_low, .*, small, same"):
        wrapper.set_context('tiny')
    for name, context, message in (
        ('low', [-3, 0], r"context_presets\['low'\]: the left context is -3"),
        ('other', 'nothing', r"context_presets\['other'\]: no preset is called 'nothing'"),
        (7, [20, 0], r"context_presets\[7\]: the name of a preset must be text"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapper.context_presets[name] = context
    assert wrapper.context_presets['low'] == [160, 0] and len(wrapper.context_presets) == len(PRESETS) + 2
    wrapper.context_presets['low'].append(7)  # a list of its own
    assert wrapper.context_presets['low'] == [160, 0] and PRESETS['low'] == (160, 0)
    assert EnhancedDynamicContextModel(tiny_model()).context_presets == {name: [*PRESETS[name]] for name in PRESETS}
    copied = copy.deepcopy(wrapper.context_presets)
    copied['other'] = 20
    assert 'other' not in wrapper.context_presets


def test_an_untrained_context_warns_and_names_the_trained(monkeypatch):
    warnings = []
    monkeypatch.setattr(ssl_models.logging, 'warning', lambda message, *_, **__: warnings.append(message))
    wrapper = EnhancedDynamicContextModel(tiny_model())
    wrapper.set_context([20, 0])
    assert not warnings
    wrapper.set_context('medium')
    assert len(warnings) == 1
    assert (
        '[240, 0], a context that the model was not trained on; it was trained on [10, 0], [20, 0], [40, 0], [-1, 0]'
        in warnings[0]
    )


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
@pytest.mark.parametrize('masked_only', [False, True])
def test_inference_masks_nothing_and_follows_the_context(position, masked_only):
    options = {'cls': EncDecMaskedTokenPredModel} if masked_only else {}
    wrapper = EnhancedDynamicContextModel(tiny_model(*position, **options))
    wrapper.train()
    wrapper.decoder.eval()  # frozen, say
    batch = noise_batch((3.0, 2.0))
    outputs = {}
    for context in (2, 20):
        with wrapper.using_context(context), recording_contexts(wrapper.model) as record:
            outputs[context] = wrapper.process(batch.audio, batch.audio_len)
        assert record.masking == [] and record.attention == [[context, 0]]
    first, second = outputs.values()
    assert not torch.equal(first.encoded, second.encoded)
    assert first.encoded.shape[::2] == first.log_probs.shape[:2] and first.encoded.shape[1] == 16
    assert first.lengths.tolist() == second.lengths.tolist() and not first.encoded.requires_grad
    assert wrapper.training and not wrapper.decoder.training
    with wrapper.using_context(2):
        assert torch.equal(wrapper.process(batch.audio, batch.audio_len).encoded, first.encoded)


@POSITIONS
@pytest.mark.parametrize('cls', [EncDecDenoiseMaskedTokenPredModel, EncDecMaskedTokenPredModel])
def test_inference_returns_what_forward_returns(position, cls):
    wrapper = EnhancedDynamicContextModel(tiny_model(*position, cls=cls).eval())
    batch = noise_batch((3.0, 2.0))
    wrapper.set_context(2)
    processed = wrapper.process(batch.audio, batch.audio_len)
    with torch.no_grad():
        expected = wrapper.model(input_signal=batch.audio, input_signal_length=batch.audio_len, apply_mask=False)
    log_probs, encoded_lengths, masks, tokens = processed
    for one, other in zip(processed, expected):
        assert torch.equal(one, other)
    assert log_probs is processed.log_probs and tokens is processed.tokens and not masks.any()
    assert encoded_lengths is processed.encoded_lengths is processed.lengths and masks is processed.masks
    assert torch.equal(wrapper.decoder(encoder_output=processed.encoded), log_probs)
    assert not wrapper.encoder._forward_hooks


def test_a_model_that_predicts_no_tokens_encodes():
    wrapper = EnhancedDynamicContextModel(tiny_model(cls=SpeechEncDecSelfSupervisedModel))
    batch = noise_batch()
    processed = wrapper.process(batch.audio, batch.audio_len)
    assert processed.encoded.shape[:2] == (2, 16) and processed.encoded.shape[2] >= processed.lengths.max() > 0
    assert processed.log_probs is processed.masks is processed.tokens is None
