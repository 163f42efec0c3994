# SPDX-License-Identifier: Apache-2.0
"""Contexts that come with the batches, or are to be the same on several processes."""

from pathlib import Path

import pytest
import torch
from corpus import data_section
from ranks import run_on_two_ranks
from spies import recording_contexts
from tiny_nest import POST_CONV, fit, noise_batch, tiny_model
from torch.utils.data import DataLoader

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel, EncDecMaskedTokenPredModel
from nemo.collections.asr.parts.att_context import create_synced_context_collate
from nemo.collections.asr.parts.att_context.synced_collate import parse_policy

OPTIONS, PROBABILITIES = [[10, 0], [20, 0], [-1, 0]], [0.3, 0.3, 0.4]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Noise(torch.utils.data.Dataset):
    """Noise that workers make."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return noise_batch((0.5, 0.3), index)


def as_it_is(samples):
    return samples[0]


def as_tuple(samples):
    return samples[0].audio, samples[0].audio_len


def synced_loader(base=as_it_is, **kwargs):
    collate = create_synced_context_collate(base, OPTIONS, PROBABILITIES, seed=5)
    return DataLoader(Noise(), batch_size=1, collate_fn=collate, **kwargs)


def expected_contexts(steps):
    draw = parse_policy(OPTIONS, PROBABILITIES, 5)
    return [draw.at(number).as_list() for number in range(steps)]


class TestSyncedBatches:
    @pytest.mark.integration
    @pytest.mark.parametrize(
        'cls, base', [(EncDecDenoiseMaskedTokenPredModel, as_it_is), (EncDecMaskedTokenPredModel, as_tuple)]
    )
    @pytest.mark.parametrize(
        'position, loading',
        [
            ((), dict()),
            (POST_CONV, dict()),
            ((), dict(num_workers=2, persistent_workers=True)),
            (POST_CONV, dict(num_workers=2)),
        ],
        ids=['pre_conv', 'post_conv', 'persistent_workers', 'workers'],
    )
    def test_a_step_attends_and_masks_within_its_batchs_context(self, cls, base, position, loading):
        model = tiny_model(*position, cls=cls)
        with recording_contexts(model) as record:
            run = fit(model, synced_loader(base, **loading), max_steps=8, max_epochs=-1)
        assert record.attention == expected_contexts(8)  # across epochs of 5
        assert record.masking == [context[0] for context in record.attention] == run.logger.column('att_context_left')


def data_config(corpus, **kwargs):
    synced = {'context_options': OPTIONS, 'context_probs': PROBABILITIES, 'seed': 5}
    return data_section(corpus, **{'synced_contexts': synced, **kwargs})


class TestSyncedContextsInTheConfig:
    @pytest.mark.integration
    @pytest.mark.parametrize('lhotse', [True, False])
    def test_training_on_speech_files(self, lhotse, speech_corpus, warnings):
        model = tiny_model('model.encoder.blockwise_attention=off')  # blocks need no mask that could be recorded
        extra = dict(use_lhotse=True, num_workers=2, use_bucketing=False, seed=0) if lhotse else {}
        model.setup_training_data(data_config(speech_corpus, **extra))
        assert isinstance(model._train_dl, DataLoader)
        with recording_contexts(model) as record:
            run = fit(model, model._train_dl, max_steps=6, max_epochs=-1)
        assert record.attention == expected_contexts(6) and run.global_step == 6
        assert all(torch.isfinite(torch.tensor(run.logger.column('train_loss'))))
        assert not any('ignored' in message and 'synced_contexts' in message for message in warnings)
        assert model.cfg.train_ds.synced_contexts.seed == 5


def context_of_each_step(steps, contexts):
    """Return the one context of each global step."""
    found = {}
    for step, context in zip(steps, contexts, strict=True):
        assert found.setdefault(step, context) == context
    return found


@pytest.mark.integration
def test_two_processes_train_in_the_same_contexts_before_and_after_a_resume(tmp_path):
    """Batches of other sizes and lengths on each; without and with synced batches from two workers per process."""
    first, second = run_on_two_ranks(Path(__file__).with_name('context_run.py'), tmp_path)
    assert first == second  # contexts of each batch, and the weights afterwards
    for name, accumulate in (('native', 1), ('synced', 2)):
        whole, resumed = first[name]['whole'], first[name]['resumed']
        assert len(whole['steps']) == 16 * accumulate and len(set(whole['masking'])) >= 3
        assert [context[0] for context in whole['attention']] == whole['masking']
        contexts = context_of_each_step(whole['steps'], whole['attention'])
        assert list(contexts) == list(range(16))
        again = context_of_each_step(resumed['steps'], resumed['attention'])
        assert again == {step: contexts[step] for step in range(8, 16)}
