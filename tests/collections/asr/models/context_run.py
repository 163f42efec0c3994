# SPDX-License-Identifier: Apache-2.0
"""A distributed training on two CPU processes; run by test_ssl_models_contexts.py.

Usage: context_run.py FOLDER, with MASTER_ADDR and MASTER_PORT set. Each case trains 16 steps, then once more from the
checkpoint of step 8. Leaves FOLDER/RANK.json: the context and the step of each batch, and what the weights add up to.
"""

import os

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import gloo_ddp, run_ranks
from spies import StepOfBatch, recording_contexts
from tiny_nest import fit, noise_batch, tiny_model
from torch.utils.data import DataLoader

from nemo.collections.asr.parts.att_context import create_synced_context_collate

STEPS = 16
SECONDS = [(0.4, 0.3), (0.6, 0.5, 0.3)]  # another batch size and length on each rank


class Utterances(torch.utils.data.Dataset):
    """Noise batches, as a dataset that lets workers make them."""

    def __len__(self):
        return 14

    def __getitem__(self, index):
        return noise_batch(SECONDS[int(os.environ['LOCAL_RANK'])], index)


def only(samples):
    """Collate the one ready batch."""
    return samples[0]


def native_loader():
    return DataLoader(Utterances(), batch_size=1, collate_fn=only)


def synced_loader():
    collate = create_synced_context_collate(only, [[10, 0], [20, 0], 'unlimited'], [0.3, 0.3, 0.4], seed=3)
    return DataLoader(Utterances(), batch_size=1, collate_fn=collate, num_workers=2, persistent_workers=True)


def train(loader, accumulate, ckpt_path=None, callbacks=(), **kwargs):
    """Train; returns what the ranks, and a resumed run, must agree in."""
    model, batches = tiny_model(), StepOfBatch()
    settings = dict(max_epochs=-1, devices=2, strategy=gloo_ddp(), accumulate_grad_batches=accumulate)
    with recording_contexts(model) as record:
        fit(model, loader, STEPS, ckpt_path, callbacks=[batches, *callbacks], **settings, **kwargs)
    weights = sum(weight.double().abs().sum() for weight in model.parameters())
    contexts = {'attention': record.attention, 'masking': record.masking}
    return {**contexts, 'steps': batches.steps, 'weights': weights.item()}


def train_and_resume(name, folder, make_loader, accumulate):
    at_half = ModelCheckpoint(folder / name, filename='{step}', every_n_train_steps=STEPS // 2, save_top_k=-1)
    whole = train(make_loader(), accumulate, callbacks=[at_half], enable_checkpointing=True)
    resumed = train(make_loader(), accumulate, ckpt_path=folder / name / f'step={STEPS // 2}.ckpt')
    return {'whole': whole, 'resumed': resumed}


def find(rank, folder):
    return {
        'native': train_and_resume('native', folder, native_loader, accumulate=1),
        'synced': train_and_resume('synced', folder, synced_loader, accumulate=2),
    }


if __name__ == '__main__':
    run_ranks(find)
