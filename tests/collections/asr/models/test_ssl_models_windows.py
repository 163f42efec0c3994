# SPDX-License-Identifier: Apache-2.0
"""Masking follows what the attention sees: chunks, look-ahead, layers that see little, encoders of others."""

import re
from functools import partial

import pytest
import torch
from tiny_nest import batches, fit, noise_batch, signals, tiny_config, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.att_context.windows import tightest_window_of

SHORTER_BLOCKS_MORE_OFTEN = ('model.masking.mask_prob=0.03', 'model.masking.block_size=24')
LOOK_AHEADS = [
    ([[0, 3]], 'chunked_limited'),
    ([[0, 8]], 'regular'),
    ([[8, 3]], 'chunked_limited'),
    ([[70, 13], [70, 6], [70, 1], [70, 0]], 'chunked_limited'),
]


def model_of(contexts, style, *overrides):
    overrides = (f'model.encoder.att_context_style={style}', *SHORTER_BLOCKS_MORE_OFTEN, *overrides)
    return tiny_model(f'model.encoder.att_context_size={str(contexts).replace(" ", "")}', *overrides)


@pytest.mark.integration
@pytest.mark.parametrize('contexts, style', LOOK_AHEADS)
def test_training_masks_and_learns_within_them(contexts, style):
    model = model_of(contexts, style)
    run = fit(model, batches(3, (4.0, 3.0)), max_steps=3)
    assert (
        min(run.logger.column('masked_share')) > 0.1
        and max(run.logger.column('masking/no_visible_frame_in_window')) == 0
    )
    assert min(run.logger.column('train_loss')) > 0


@pytest.mark.parametrize('contexts, style', [([[0, 0]], 'regular'), ([[10, 0], [0, 0]], 'chunked_limited')])
def test_a_context_in_which_nothing_could_be_predicted_is_refused_before_training(contexts, style):
    with pytest.raises(ValueError, match=r'model.encoder.att_context_size \[0, 0\]: no layer sees another frame'):
        fit(model_of(contexts, style), batches(1), max_steps=1)
    with pytest.raises(ValueError, match='model.masking.left_context_size is 0 and'):
        fit(model_of([[10, 0]], 'regular', '+model.masking.left_context_size=0'), batches(1), max_steps=1)


def test_a_layer_that_sees_itself_alone_is_left_out_of_what_masking_asks(warnings):
    layers = 'model.encoder.n_layers=3', '+model.encoder.layer_att_context_size=[[20,0],[0,0],[6,0]]'
    model = model_of([[10, 0]], 'regular', *layers)
    assert any('a left context of 0' in message for message in warnings)
    assert model.encoder.tightest_left_context() == 6
    masks = model(**signals(noise_batch((6.0,))), apply_mask=True)[2]
    assert masks.any()


class TestOtherEncoders:
    """Of NeMo's later versions, or a user's own: no ``ConformerEncoder``."""

    class Own(torch.nn.Module):
        subsampling_factor, d_model = 8, 16

        def __init__(self, **attributes):
            super().__init__()
            self.project = torch.nn.Linear(80, 16)
            self.__dict__.update(attributes)

        def forward(self, audio_signal, length):
            frames = audio_signal.unfold(2, 8, 8).mean(dim=-1)
            return self.project(frames.transpose(1, 2)).transpose(1, 2), length // 8

    def model_with(self, monkeypatch, **attributes):
        made = partial(self.Own, **attributes)
        serialize = EncDecDenoiseMaskedTokenPredModel.from_config_dict

        def from_config_dict(config, *args, **kwargs):
            is_encoder = 'n_layers' in config
            return made() if is_encoder else serialize(config, *args, **kwargs)

        monkeypatch.setattr(EncDecDenoiseMaskedTokenPredModel, 'from_config_dict', staticmethod(from_config_dict))
        cfg = tiny_config('~model.validate_contexts', '~model.audit_every_n_batches', '~model.log_figures').model
        return EncDecDenoiseMaskedTokenPredModel(cfg)

    @pytest.mark.parametrize(
        'attributes, expected',
        [
            (dict(att_context_size=[5, 0]), 5),
            (dict(att_context_size=(-1, 0)), -1),
            (dict(att_context_size=[8, 3], att_context_style='chunked_limited'), 8),
        ],
    )
    def test_an_encoder_that_tells_its_context_is_followed(self, monkeypatch, warnings, attributes, expected):
        model = self.model_with(monkeypatch, **attributes)
        assert not [message for message in warnings if 'ignores the context' in message]
        assert model.mask_processor.left_context_size == tightest_window_of(model.encoder).context.left == expected
        with torch.no_grad():
            assert model(**signals(noise_batch((4.0, 3.0))), apply_mask=True)[2].any()

    @pytest.mark.parametrize(
        'attributes, reason',
        [
            (dict(), 'its att_context_size is missing'),
            (dict(att_context_size=[[5, 0], [10, 0]]), r'its att_context_size is \[\[5, 0\]'),
            (dict(att_context_size=[5, 0], att_context_style='own'), 'its att_context_style own'),
        ],
    )
    def test_one_that_does_not_is_named_once_with_what_is_missing(self, monkeypatch, warnings, attributes, reason):
        model = self.model_with(monkeypatch, **attributes)
        (told,) = [message for message in warnings if 'RandomBlockMasking ignores the context of Own' in message]
        assert re.search(reason, told) and model.mask_processor.left_context_size == -1
