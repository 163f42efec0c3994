# SPDX-License-Identifier: Apache-2.0
"""A context set by hand on an encoder, as NeMo's attribute."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import ListConfig, OmegaConf
from spies import recording_contexts
from tiny_encoder import tiny_encoder
from tiny_nest import POSITIONS, PRESETS, batches, fit, tiny_model

from nemo.collections.asr.parts.att_context import AttContext, batch_context


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class OwnCurriculum(pl.Callback):
    """What people write: NeMo's attribute on the encoder, in each step."""

    def __init__(self, contexts):
        self.contexts = contexts

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.encoder.att_context_size = self.contexts[trainer.global_step]


class TestSetOnTheEncoder:
    @pytest.mark.integration
    @POSITIONS
    def test_it_holds_in_training_for_attention_and_masking(self, position):
        model = tiny_model(PRESETS, *position)
        model.encoder.att_context_size = [160, 0]
        with recording_contexts(model) as record:
            logged = fit(model, batches(3), max_steps=6, max_epochs=-1).logger.column('att_context_left')
        assert record.masking == [160] * 6 == logged and record.attention == [[160, 0]] * 6
        assert model.att_context_set_by_hand == [160, 0]

    @pytest.mark.integration
    @pytest.mark.parametrize('nothing', [None, [[10, 0], [20, 0], [40, 0], [-1, 0]]], ids=['None', 'configured'])
    def test_the_draw_comes_back(self, nothing):
        model, untouched = tiny_model(), tiny_model()
        model.encoder.att_context_size = [20, 0]
        model.encoder.att_context_size = OmegaConf.create(nothing) if nothing else nothing
        assert model.encoder.att_context_size == [10, 0] and model.att_context_set_by_hand is None
        drawn = []
        for each in (model, untouched):
            with recording_contexts(each) as record:
                drawn.append(fit(each, batches(3), max_steps=12, max_epochs=-1).logger.column('att_context_left'))
            assert record.masking == [attention[0] for attention in record.attention] == drawn[-1]
        assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1

    @pytest.mark.integration
    def test_a_curriculum_of_the_users_own(self, warnings):
        contexts = [[10, 0], [10, 0], [20, 0], [30, 0], [30, 0], [-1, 0]]
        model = tiny_model()
        with recording_contexts(model) as record:
            run = fit(model, batches(3), max_steps=6, max_epochs=-1, callbacks=[OwnCurriculum(contexts)])
        lefts = [left for left, _ in contexts]
        assert record.attention == contexts and record.masking == lefts
        assert run.logger.column('att_context_left') == lefts
        assert len([message for message in warnings if 'not trained on' in message]) == 1  # [30, 0], set twice

    def test_it_is_said_once(self, monkeypatch):
        told = []
        monkeypatch.setattr(batch_context.logging, 'info', told.append)
        encoder = tiny_model().encoder
        told.clear()
        for _ in range(3):
            encoder.att_context_size = [20, 0]
        assert told == ['The attention context is [20, 0] from now on, set by hand']
        encoder.att_context_size = None
        assert encoder.att_context_size == [10, 0]

    @pytest.mark.parametrize('context', [160, 'low', (160, 0), ListConfig([160, 0]), AttContext(160, 0)])
    def test_it_takes_all_that_is_a_context(self, context):
        encoder = tiny_model(PRESETS).encoder
        encoder.att_context_size = context
        assert encoder.att_context_size == [160, 0] and encoder.streaming_cfg.last_channel_cache_size == 160
        for bad in ('lowest', [1, 2, 3], [-2, 0]):
            with pytest.raises(ValueError):
                encoder.att_context_size = bad
        assert encoder.att_context_size == [160, 0]

    def test_nemos_own_assignments_are_no_setting_by_hand(self):
        model = tiny_model()
        model.encoder.set_default_att_context_size([20, 0])
        model.change_attention_model('abs_pos', [40, 0])
        model.change_attention_model('rel_pos', [20, 0])
        assert model.encoder.att_context_size == [20, 0] and model.att_context_set_by_hand is None
        with recording_contexts(model) as record:
            fit(model, batches(3), max_steps=12, max_epochs=-1)
        assert len(set(record.masking)) > 1

    def test_what_is_set_last_holds(self):
        encoder = tiny_model(PRESETS).encoder
        encoder.att_context_size = [160, 0]
        encoder.set_default_att_context_size([240, 0])
        assert encoder.att_context_size == [240, 0] == encoder.draw_att_context_size(0).as_list()
        encoder.att_context_size = None
        assert encoder.att_context_size == [80, 0] and encoder.att_context_by_hand is None

    @pytest.mark.parametrize(
        'copied', [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=['copy', 'pickle']
    )
    def test_a_copy_of_the_encoder_goes_on_alike_and_on_its_own(self, copied):
        encoder = tiny_encoder(att_context_size=[[4, 0], [8, 0], [-1, 0]]).train()
        plain = copied(encoder)
        assert [plain.draw_att_context_size(step) for step in range(9)] == [
            encoder.draw_att_context_size(step) for step in range(9)
        ]
        plain.att_context_size = [8, 0]
        assert plain.att_context_by_hand == AttContext(8, 0) and encoder.att_context_by_hand is None
        by_hand = copied(plain)
        assert by_hand.att_context_size == [8, 0] and {*map(by_hand.draw_att_context_size, range(9))} == {
            AttContext(8, 0)
        }
        by_hand.att_context_size = None
        assert by_hand.att_context_size == [4, 0] and plain.att_context_size == [8, 0]
        by_hand.set_default_att_context_size([8, 0])
        assert by_hand.att_context_by_hand is None
