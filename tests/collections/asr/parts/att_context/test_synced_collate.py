# SPDX-License-Identifier: Apache-2.0
import gc
import pickle
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny_nest import noise_batch
from torch.utils.data import DataLoader

from nemo.collections.asr.data.ssl_dataset import AudioNoiseBatch
from nemo.collections.asr.parts.att_context import AttContext, create_synced_context_collate
from nemo.collections.asr.parts.att_context.synced_collate import SyncedBatch, parse_policy

OPTIONS, PROBABILITIES = [[10, 0], [20, 0], 'unlimited'], [0.2, 0.3, 0.5]


def one_noise_batch(samples):
    return noise_batch((0.1,), int(samples[0]))


def as_tuple(samples):
    return torch.tensor(samples), torch.tensor([1])


def loader(base, length=7, **kwargs):
    collate = create_synced_context_collate(base, OPTIONS, PROBABILITIES, seed=2)
    return DataLoader(range(length), batch_size=1, collate_fn=collate, **kwargs)


def expected(numbers):
    draw = parse_policy(OPTIONS, PROBABILITIES, 2)
    return [draw.at(number) for number in numbers]


@pytest.mark.parametrize('base', [one_noise_batch, as_tuple])
@pytest.mark.parametrize('workers', [0, 2])
def test_each_batch_carries_its_context(base, workers):
    made = list(loader(base, num_workers=workers))
    assert [batch.att_context for batch in made] == expected(range(7))
    assert len({batch.att_context for batch in made}) > 1
    for batch in made:
        assert isinstance(batch, AudioNoiseBatch if base is one_noise_batch else SyncedBatch)
        assert batch.context_draw == parse_policy(OPTIONS, PROBABILITIES, 2)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('persistent', [False, True])
def test_the_count_over_epochs(workers, persistent):
    """Persistent workers count on; others are given the number of the first batch."""
    data = loader(as_tuple, length=4, num_workers=workers, persistent_workers=persistent and workers > 0)
    contexts = []
    for epoch in range(3):
        if not persistent:
            data.collate_fn.start_at(4 * epoch)
        contexts += [batch.att_context for batch in data]
    assert contexts == expected(range(12))


def test_configs_are_read_as_lists():
    config = OmegaConf.create({'options': OPTIONS, 'probabilities': PROBABILITIES})
    assert parse_policy(config.options, config.probabilities) == parse_policy(OPTIONS, PROBABILITIES)
    assert parse_policy(['low']).options == (AttContext(160, 0),)
    assert parse_policy(OPTIONS).probabilities == pytest.approx((1 / 3,) * 3)


def test_a_list_becomes_a_batch_that_pickles_and_pins_with_its_context(monkeypatch):
    batch = create_synced_context_collate(list, OPTIONS)([torch.zeros(2), 5])
    again = pickle.loads(pickle.dumps(batch))
    assert isinstance(again, SyncedBatch) and again[1] == 5 and again.att_context == batch.att_context
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor + 1)  # needs a GPU
    pinned = batch.pin_memory()
    assert pinned[0].tolist() == [1, 1] and pinned.att_context == batch.att_context
    assert pinned.context_draw == batch.context_draw


@pytest.mark.parametrize('batch', [{'audio': 1}, torch.zeros(2), namedtuple('Named', 'audio')(1), 'text'])
def test_a_batch_that_cannot_carry_a_context_is_refused(batch):
    with pytest.raises(ValueError, match=f'type {type(batch).__name__} cannot have'):
        create_synced_context_collate(lambda samples: batch, OPTIONS)([])


class Model(torch.nn.Module):
    """Cannot be pickled, and has a representation of many lines."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(20)))

    def __reduce_ex__(self, protocol):
        raise TypeError('a model was sent to a worker')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (([],), r'context_options is \[\]; it must be a list of contexts, and not empty'),
        (([80, 0],), 'context_options: item 0: 80 is no context; give a pair'),
        (([[80, 0], [-5, 0]],), 'context_options: item 1: the left context is -5'),
        (([[80, 0], 'lowest'],), "context_options: item 1: no preset is called 'lowest'"),
        (([[80, 0]], [0.5, 0.5]), 'must have a number from 0 to 1 for each of 1 options'),
        (([[80, 0], [40, 0]], [1.5, -0.5]), r'context_probs is \[1.5, -0.5\]; .* from 0 to 1'),
        (([[80, 0], [40, 0]], [0.5, '0.5']), r"context_probs is \[0.5, '0.5'\]; it must have a number"),
        (([[80, 0], [40, 0]], [0.5, 0.500002]), 'they must sum to 1'),
        (([[80, 0]], None, 'seven'), "seed is 'seven'"),
        ((Model(), Model()), r'context_options is Model\(.* \.\.\.; it must be a list of contexts'),
    ],
)
def test_errors_name_the_argument_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        create_synced_context_collate(list, *arguments)
    assert '\n' not in str(error.value)


def test_sums_within_a_millionth_are_one():
    create_synced_context_collate(list, [[80, 0], [40, 0]], [0.5, 0.5000005])
    create_synced_context_collate(list, [[left, 0] for left in range(10)], [0.1] * 10)
    create_synced_context_collate(list, [[80, 0], [40, 0]], list(np.float32([0.5, 0.5])))


@pytest.mark.parametrize(
    'make',
    [
        lambda model: create_synced_context_collate(as_tuple, model, OPTIONS, PROBABILITIES, 0),
        lambda model: create_synced_context_collate(as_tuple, None, OPTIONS, PROBABILITIES),
        lambda model: create_synced_context_collate(as_tuple, model, OPTIONS, context_probs=PROBABILITIES),
        lambda model: create_synced_context_collate(
            base_collate_fn=as_tuple, model=model, context_options=OPTIONS, context_probs=PROBABILITIES
        ),
        lambda model: create_synced_context_collate(as_tuple, OPTIONS, PROBABILITIES, model=model, seed=0),
        lambda model: create_synced_context_collate(as_tuple, OPTIONS, PROBABILITIES),
        lambda model: create_synced_context_collate(as_tuple, context_options=OPTIONS, context_probs=PROBABILITIES),
    ],
)
def test_a_model_is_taken_and_not_kept(make):
    model = Model()
    collate, kept = make(model), weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None
    again = pickle.loads(pickle.dumps(collate))
    assert again.policy == parse_policy(OPTIONS, PROBABILITIES)
    assert again([1, 2]).att_context == again.policy.at(0)


def test_all_arguments_of_a_call_reach_the_base():
    def base(samples, padding, *more, pad_to=None):
        return samples, padding, more, pad_to

    collate = create_synced_context_collate(base, OPTIONS)
    assert tuple(collate([1], 'zeros', 3, pad_to=16)) == ([1], 'zeros', (3,), 16)
    with pytest.raises(ValueError, match='base_collate_fn is None'):
        create_synced_context_collate(None, OPTIONS)
