# SPDX-License-Identifier: Apache-2.0
"""The context of a model. Contexts of batches are tested in ``test_ssl_models_contexts.py``."""

import pytest
import torch
from omegaconf import OmegaConf
from spies import recording_contexts
from tiny_nest import PRESETS, batches, fit, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class TestOverride:
    @pytest.mark.integration
    def test_it_holds_in_training_until_it_is_taken_back(self):
        model = tiny_model()
        model.set_att_context_size([20, 0])
        with recording_contexts(model) as record:
            fit(model, batches(3), max_steps=6, max_epochs=-1)
        assert record.masking == [20] * 6 and record.attention == [[20, 0]] * 6

        model.set_att_context_size(None)
        assert model.encoder.att_context_size == [10, 0] and model.mask_processor.left_context_size == 10
        with recording_contexts(model) as record:
            logged = fit(model, batches(3), max_steps=12, max_epochs=-1).logger.column('att_context_left')
        assert record.masking == logged and len(set(logged)) > 1
        model.set_att_context_size(None)  # nothing to take back, nothing done
        assert model.encoder.att_context_size == [10, 0]

    def test_an_untrained_context_warns_once_and_names_the_trained(self, warnings):
        model = tiny_model()
        model.set_att_context_size([33, 0])
        assert [message for message in warnings if '[33, 0]' in message] == warnings and len(warnings) == 1
        assert 'not trained on; it was trained on [10, 0], [20, 0], [40, 0], [-1, 0]' in warnings[0]

    def test_what_is_no_context_is_refused_and_changes_nothing(self):
        model = tiny_model()
        with pytest.raises(ValueError, match="no preset is called 'lowest'; known are very_low, low"):
            model.set_att_context_size('lowest')
        assert model.encoder.att_context_size == [10, 0] and model.att_context_override is None

    def test_a_context_that_the_attention_cannot_follow_is_refused(self):
        model = tiny_model('model.encoder.att_context_style=chunked_limited', 'model.encoder.att_context_size=[[8,3]]')
        with pytest.raises(ValueError, match='multiple of the chunk, 4'):
            model.set_att_context_size([10, 3])
        assert model.encoder.att_context_size == [8, 3]

    def test_a_block_of_code_leaves_everything_as_it_was(self):
        model = tiny_model(PRESETS, '+model.masking.left_context_size=7')
        with pytest.raises(KeyError):
            with model.using_att_context_size('medium'):
                assert model.mask_processor.left_context_size == 7  # configured, and tighter
                raise KeyError
        assert model.encoder.att_context_size == [80, 0] and model.mask_processor.left_context_size == 7
        assert model.encoder.streaming_cfg.last_channel_cache_size == 80
        model.set_att_context_size('high')
        with model.using_att_context_size('medium'):
            assert model.encoder.att_context_size == [240, 0]
        assert model.encoder.att_context_size == [320, 0] and model.mask_processor.left_context_size == 7

    def test_configs_and_checkpoints_know_nothing_of_it(self, tmp_path):
        model = tiny_model(PRESETS)
        config, weights = OmegaConf.to_yaml(model.cfg), list(model.state_dict())
        model.set_att_context_size('high')
        assert OmegaConf.to_yaml(model.cfg) == config and list(model.state_dict()) == weights
        model.save_to(str(tmp_path / 'model.nemo'))
        restored = EncDecDenoiseMaskedTokenPredModel.restore_from(str(tmp_path / 'model.nemo'))
        assert restored.encoder.att_context_size == [80, 0] and restored.mask_processor.left_context_size == 80
