# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints count after a run was cut short; the whole of it is in ``tests/faults``."""

import os

import pytest
import torch

from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.callbacks.nemo_model_checkpoint import AtomicCheckpointIO
from nemo.utils.exp_manager import _filter_out_unfinished_checkpoints


def save(path, step, seconds):
    AtomicCheckpointIO().save_checkpoint({'global_step': step, 'state_dict': {}}, path)
    os.utime(path, (seconds, seconds))
    return path


def mark(path):
    NeMoModelCheckpoint.set_checkpoint_unfinished_marker(path)


def test_of_two_last_checkpoints_the_newer_counts(tmp_path):
    old = save(tmp_path / 'm--epoch=1-last.ckpt', 2, 1000)
    new = save(tmp_path / 'm--epoch=0-last.ckpt', 4, 2000)
    best = save(tmp_path / 'm--epoch=0.ckpt', 2, 500)
    of_another_run = save(tmp_path / 'n--epoch=0-last.ckpt', 2, 500)
    assert _filter_out_unfinished_checkpoints([old, new, best, of_another_run]) == [new, best, of_another_run]
    NeMoModelCheckpoint._remove_unfinished_checkpoints(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([new, best, of_another_run])


def test_a_whole_checkpoint_counts_in_spite_of_its_mark(tmp_path):
    last = save(tmp_path / 'm-last.ckpt', 2, 1000)
    mark(last)  # NeMo overwrites a checkpoint of the same name, and was killed before it was replaced
    assert not NeMoModelCheckpoint.is_checkpoint_unfinished(last)
    NeMoModelCheckpoint._remove_unfinished_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == [last]


def test_half_a_checkpoint_does_not_count(tmp_path):
    old, half = save(tmp_path / 'm--a-last.ckpt', 2, 1000), tmp_path / 'm--b-last.ckpt'
    half.write_bytes(old.read_bytes()[:-100])
    mark(half)
    assert _filter_out_unfinished_checkpoints([old, half]) == [old]
    NeMoModelCheckpoint._remove_unfinished_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == [old]


def test_distributed_checkpoints_are_left_to_nemo(tmp_path):
    folder = tmp_path / 'm-last'
    folder.mkdir()
    assert not NeMoModelCheckpoint.is_checkpoint_unfinished(folder)
    mark(folder)
    assert NeMoModelCheckpoint.is_checkpoint_unfinished(folder)


def test_a_failing_save_leaves_the_earlier_checkpoint(tmp_path):
    path = save(tmp_path / 'm.ckpt', 2, 1000)
    with pytest.raises(Exception, match='pickle|lambda'):
        AtomicCheckpointIO().save_checkpoint({'state_dict': lambda: 0}, path)
    assert torch.load(path)['global_step'] == 2 and list(tmp_path.iterdir()) == [path]
