# SPDX-License-Identifier: Apache-2.0
"""The context that an encoder owns: policy, override, active context."""

import copy
import pickle
import threading

import pytest
import torch
from omegaconf import OmegaConf, open_dict
from spies import recording_contexts
from tiny_encoder import tiny_encoder
from tiny_nest import POSITIONS, PRESETS, batches, fit, noise_batch, signals, tiny_model, trainer

from nemo.collections.asr.parts.att_context import AttContext

COPIED = pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=['copy', 'pickle']
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class TestOverride:
    @pytest.mark.parametrize('nothing', [None, [[10, 0], [20, 0], [40, 0], [-1, 0]]], ids=['None', 'configured'])
    def test_the_draw_comes_back(self, nothing):
        model, untouched = tiny_model().train(), tiny_model().train()
        model.encoder.att_context_size = [20, 0]
        assert model.mask_processor.left_context_size == 20
        model.encoder.att_context_size = OmegaConf.create(nothing) if nothing else nothing
        assert model.encoder.att_context_size == [10, 0] and model.att_context_override is None
        assert model.mask_processor.left_context_size == 10
        drawn = [[each.encoder.draw_att_context_size(step) for step in range(12)] for each in (model, untouched)]
        assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1

    def test_nemos_own_assignments_set_the_default_and_clear_the_override(self):
        model = tiny_model()
        model.encoder.att_context_size = [40, 0]
        model.encoder.set_default_att_context_size([20, 0])
        assert model.encoder.att_context_size == [20, 0] and model.att_context_override is None
        model.change_attention_model('abs_pos', [40, 0])
        model.change_attention_model('rel_pos', [20, 0])
        assert model.encoder.att_context_size == [20, 0] and model.att_context_override is None
        assert len({model.encoder.train().draw_att_context_size(step) for step in range(12)}) > 1

    @pytest.mark.parametrize('contexts', ['[[-1,-1]]', '[[40,0],[20,0]]'])
    def test_local_attention_trains_in_its_own_context(self, contexts):
        model = tiny_model(f'model.encoder.att_context_size={contexts}')
        model.change_attention_model('rel_pos_local_attn', [8, 8])
        run = fit(model, batches(2), 2)
        assert run.logger.column('att_context_left') == run.logger.column('att_context_right') == [8, 8]

    def test_a_single_context_that_is_exchanged_is_the_one_to_validate(self):
        model = tiny_model('model.encoder.att_context_size=[40,0]')
        model.change_attention_model('rel_pos', [20, 0])
        run = trainer(1)
        model.set_trainer(run)
        run.fit(model, batches(1), batches(1))
        assert [name for name in run.callback_metrics if name.startswith('val_loss/ctx')] == ['val_loss/ctx_20_0']

    def test_a_sampler_is_kept_where_the_new_attention_can_have_its_contexts(self):
        model = tiny_model(
            'model.encoder.att_context_style=chunked_limited',
            'model.encoder.att_context_size=[8,1]',
            '+model.encoder.att_context_sampler={full_prob: 0.5, chunk_size: [1, 2], left_chunks: [2, 3], left_limited_prob: 0.5}',
        )
        sampler = model.encoder.att_context_policy.sampler
        model.change_attention_model('rel_pos', [6, 1])
        assert model.encoder.att_context_policy.sampler == sampler and sampler is not None
        model.change_attention_model('rel_pos_local_attn', [8, 8])
        assert model.encoder.att_context_policy.sampler is None

    @pytest.mark.parametrize('objective', ['masked', 'next_token'])
    def test_contexts_that_come_with_the_batches_are_checked_before_the_first(self, objective):
        model = tiny_model('model.encoder.att_context_style=chunked_limited', 'model.encoder.att_context_size=[28,6]',
                           f'+model.objective={objective}')  # fmt: skip
        with open_dict(model.cfg):
            model.cfg.train_ds = {'synced_contexts': {'context_options': [[28, 6], [30, 6]]}}
        with pytest.raises(ValueError, match='left context is 30'):
            fit(model, batches(1), 1)

    def test_an_override_set_inside_a_block_holds_after_it(self):
        encoder = tiny_model(PRESETS).encoder
        with encoder.using_att_context_size([240, 0]):
            encoder.att_context_size = [160, 0]
            assert encoder.att_context_size == [240, 0]
        assert encoder.att_context_size == [160, 0]

    @COPIED
    def test_a_copy_of_the_encoder_goes_on_alike_and_on_its_own(self, copied):
        encoder = tiny_encoder(att_context_size=[[4, 0], [8, 0], [-1, 0]]).train()
        plain = copied(encoder)
        assert [plain.draw_att_context_size(step) for step in range(9)] == [
            encoder.draw_att_context_size(step) for step in range(9)
        ]
        plain.att_context_size = [8, 0]
        assert plain.att_context_override == AttContext(8, 0) and encoder.att_context_override is None
        overridden = copied(plain)
        assert {*map(overridden.draw_att_context_size, range(9))} == {AttContext(8, 0)}
        overridden.att_context_size = None
        assert overridden.att_context_size == [4, 0] and plain.att_context_size == [8, 0]


@pytest.mark.parametrize('owner', ['model', 'encoder'])
def test_a_block_around_a_training_step_decides_its_context(owner):
    model = tiny_model()
    with recording_contexts(model) as record:
        with (model if owner == 'model' else model.encoder).using_att_context_size([5, 0]):
            fit(model, batches(1), max_steps=1)
    assert record.attention == [[5, 0]] and record.masking == [5]


def test_a_block_in_which_no_frame_sees_another_is_refused_in_training():
    model = tiny_model()
    with pytest.raises(ValueError, match=r'att_context_size \[0, 0\]: no layer sees another frame'):
        with model.using_att_context_size([0, 0]):
            fit(model, batches(1), max_steps=1)
    with torch.no_grad(), model.eval().using_att_context_size([0, 0]):
        model(**signals(noise_batch()), apply_mask=True)


def shared_encoder():
    encoder = tiny_encoder(att_context_size=[[4, 0], [8, 0]]).eval()
    return encoder, lambda: encoder(audio_signal=torch.randn(1, 8, 80), length=torch.tensor([80]))


def shared_model():
    model = tiny_model('model.encoder.att_context_size=[[4,0],[8,0]]').eval()
    return model.encoder, lambda: model(**signals(noise_batch()))


@pytest.mark.parametrize('shared', [shared_encoder, shared_model])
def test_threads_that_share_an_encoder_in_inference_leave_no_context_behind(shared):
    encoder, run = shared()
    entered, second_is_in, calls = threading.Event(), threading.Event(), []

    def interleave(*_):  # the first thread leaves while the second is inside
        calls.append(len(calls))
        if len(calls) == 1:
            entered.set()
            second_is_in.wait(9)
        else:
            second_is_in.set()
            first.join(9)

    encoder.pre_encode.register_forward_pre_hook(interleave)
    first, second = (threading.Thread(target=run) for _ in range(2))
    first.start()
    entered.wait(9)
    second.start()
    second.join(9)
    encoder.att_context_size = [8, 0]
    assert len(calls) == 2 and encoder.att_context_size == [8, 0]


@COPIED
@POSITIONS
def test_a_copied_masking_asks_the_copied_encoder(copied, position):
    model = tiny_model(*position)
    encoder, masking = copied((model.encoder, model.mask_processor))
    encoder.att_context_size = [3, 0]
    assert masking.left_context_size == 3 and model.mask_processor.left_context_size == 10
    assert list(masking.state_dict()) == ['mask_embedding'] and len(list(masking.modules())) == 1
