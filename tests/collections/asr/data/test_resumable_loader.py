# SPDX-License-Identifier: Apache-2.0
"""A loader that is stopped anywhere gives the rest as if it had not been; a whole run is in ``tests/faults``."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from nemo.collections.asr.data.resumable_loader import derive_seed, make_resumable

ITEMS = 11


class Noisy(Dataset):
    """An item is its index and draws from all generators."""

    def __len__(self):
        return ITEMS

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])


def collate(items):
    return torch.stack(items) + torch.rand(())  # augmentors draw here


def resumable(workers=0, shuffle=True, seed=3, **more):
    plain = DataLoader(Noisy(), 2, shuffle=shuffle, num_workers=workers, collate_fn=collate, **more)
    return make_resumable(plain, {'seed': seed})


def epoch(loader, number, stop=None):
    """The batches of an epoch, and what a training step on each would draw."""
    loader.sampler.set_epoch(number)
    given = []
    for batch in loader:
        given.append((batch.tolist(), torch.rand(2).tolist(), random.random()))
        if len(given) == stop:
            break
    return given


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('shuffle', [True, False])
def test_goes_on_where_it_was(workers, shuffle):
    whole = [epoch(resumable(0, shuffle), number) for number in (0, 1, 2)]
    stopped = resumable(workers, shuffle)
    assert epoch(stopped, 0) == whole[0] and epoch(stopped, 1, stop=2) == whole[1][:2]
    again = resumable(workers, shuffle)
    again.load_state_dict(stopped.state_dict())
    assert len(again) == len(stopped) == 6
    assert epoch(again, 1) == whole[1][2:]
    assert epoch(again, 2) == whole[2]


@pytest.mark.parametrize('number, stop, state', [(1, 2, (1, 4)), (0, None, (1, 0))])
def test_lightning_may_begin_to_iterate_before_it_tells_the_epoch(number, stop, state):
    stopped, again = resumable(2), resumable(2)
    epoch(stopped, number, stop)
    assert stopped.state_dict() == {'epoch': state[0], 'used': state[1], 'ranks': 1}
    again.load_state_dict(stopped.state_dict())
    batches = iter(again)
    again.sampler.set_epoch(1)
    assert [batch.tolist() for batch in batches] == [batch for batch, _, _ in epoch(resumable(), 1)[stop:]]


def test_epochs_and_seeds_differ_and_each_item_comes_once():
    loader = resumable()
    orders = [[int(item[0]) for batch, _, _ in epoch(loader, number) for item in batch] for number in (0, 1)]
    orders.append([int(item[0]) for batch, _, _ in epoch(resumable(seed=4), 0) for item in batch])
    assert len({tuple(order) for order in orders}) == 3
    in_order = [epoch(resumable(shuffle=False), number) for number in (0, 1)]
    assert in_order[0] != in_order[1]  # the draws
    assert len({draw for _, _, draw in in_order[0]}) == 6
    assert len(list(resumable(drop_last=True))) == 5


def test_stays_what_it_is_when_lightning_puts_a_distributed_sampler_in():
    ranks = []
    for rank in (0, 1):
        sampler = DistributedSampler(Noisy(), num_replicas=2, rank=rank, shuffle=True)
        loader, again = (_update_dataloader(resumable(), sampler) for _ in range(2))
        whole = epoch(loader, 1)
        assert epoch(loader, 1, stop=2) == whole[:2]
        again.load_state_dict(loader.state_dict())
        assert epoch(again, 1) == whole[2:] and len(loader) == len(whole) == 3
        ranks.append({int(item[0]) for batch, _, _ in whole for item in batch})
    assert set.union(*ranks) == set(range(ITEMS))


def shares(ranks, number, stop=None, states=()):
    """What each of some ranks is given in an epoch, item numbers by batch, and the state that the first leaves."""
    given, state = [], None
    for rank in range(ranks):
        sampler = DistributedSampler(Noisy(), num_replicas=ranks, rank=rank, shuffle=True)
        loader = _update_dataloader(resumable(), sampler) if ranks > 1 else resumable()
        if states:
            loader.load_state_dict(states[0])
        given.append([[int(item[0]) for item in batch] for batch, _, _ in epoch(loader, number, stop)])
        state = state or loader.state_dict()
    return given, state


@pytest.mark.parametrize('before, after, stop', [(2, 1, 2), (1, 2, 2), (1, 2, 3), (2, 1, 1), (1, 3, 4), (3, 2, 1)])
def test_goes_on_with_other_ranks_without_repeating_or_losing_more_than_a_batch_of_each(before, after, stop, warnings):
    first, state = shares(before, 1, stop)
    second, _ = shares(after, 1, states=[state])
    assert len({len(share) for share in second}) == 1  # none waits for another at the end
    used = [item for share in first for batch in share for item in batch]
    rest = [item for share in second for batch in share for item in batch]
    assert set(used) | set(rest) == set(range(ITEMS))
    repeated = len(used) + len(rest) - ITEMS
    assert repeated < 2 * after
    assert f"{before} ranks had used {state['used']} utterances of epoch 1; {after} continue after" in ''.join(
        warnings
    )


def test_a_batch_that_is_fetched_ahead_of_the_step_is_not_lost():
    whole, loader, again = epoch(resumable(), 1), resumable(), resumable()
    loader.sampler.set_epoch(1)
    batches = iter(loader)
    next(batches)
    loader.start_step()
    first = torch.rand(2).tolist()
    next(batches)  # Lightning does, where a loader has no length
    again.load_state_dict(loader.state_dict())
    assert first == whole[0][1] and loader.state_dict()['used'] == 2
    assert epoch(again, 1) == whole[1:]


def test_seeds_do_not_depend_on_the_process():
    assert derive_seed(3, 'step', 0, 1, 2) == 3201826510695193048
    assert derive_seed(3, 'step', 0, 1, 2) != derive_seed(3, 'step', 0, 12)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_data_without_positions_are_refused():
    with pytest.raises(ValueError, match='needs data with positions'):
        make_resumable(DataLoader(Stream()), {})
