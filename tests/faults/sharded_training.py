# SPDX-License-Identifier: Apache-2.0
"""Trains on shards, on the ranks of a torchrun; started again, it goes on from the last checkpoint.

    torchrun --nproc_per_node 2 [--max-restarts 1] sharded_training.py FOLDER SHARDS NOISE_SHARDS VALIDATION [STRIKE]

At the beginning of step STRIKE rank 1 kills itself, if it was not started before; 0: it never does. Each rank appends
(step, loss, context, value of ``data_wait_share``) of each step to ``FOLDER/steps-RANK.jsonl``; rank 0 leaves
``FOLDER/trained.nemo`` and ``FOLDER/validation.json``.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as pl
import torch
from omegaconf import open_dict
from tiny_nest import tiny_config, trainer
from training_runs import exp_manager_config, kill

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.utils.exp_manager import exp_manager

MAX_STEPS = 9
CONTEXTS = [[10, 0], [20, 0], [-1, 0]]


class Steps(pl.Callback):
    """Writes down each step, and strikes."""

    def __init__(self, path: Path, strike: int):
        self.path = path
        self.strike = strike if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0' else 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.strike and trainer.global_step == self.strike and trainer.global_rank == 1:
            kill()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        waited = trainer.callback_metrics.get('data_wait_share')
        row = [trainer.global_step, float(outputs['loss']), list(batch.att_context), waited and float(waited)]
        with open(self.path, 'a') as file:
            file.write(json.dumps(row) + '\n')


def model_config(shards: str, noise: str, validation: str):
    """The tiny model on shards, in synced contexts, validated in every context."""
    cfg = tiny_config(
        f'model.encoder.att_context_size={CONTEXTS}', name='nest_fast-conformer_streaming_lhotse_tiny'
    ).model
    common = {'sample_rate': 16000, 'num_workers': 2}
    with open_dict(cfg):
        cfg.log_figures = False
        cfg.validation_ds = {'manifest_filepath': validation, 'shuffle': False, 'batch_size': 2, **common}
        cfg.train_ds = {
            'use_lhotse': True,
            'shar_path': shards,
            'noise_manifest': noise,
            'shuffle': True,
            'batch_size': 2,
            'shuffle_buffer_size': 20,
            'max_duration': 20.0,
            'resumable': {'seed': 3},
            'synced_contexts': {'context_options': CONTEXTS, 'seed': 5},
            **common,
        }
    return cfg


def main(folder: str, shards: str, noise: str, validation: str, strike: str = '0') -> None:
    """Train, or go on."""
    folder, rank = Path(folder), int(os.environ['RANK'])
    pl.seed_everything(1)
    torch.set_num_threads(1)
    fitter = trainer(
        MAX_STEPS,
        devices=int(os.environ['WORLD_SIZE']),
        strategy='ddp',
        callbacks=[Steps(folder / f'steps-{rank}.jsonl', int(strike))],
        logger=False,
        enable_checkpointing=False,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
    )
    exp_manager(fitter, exp_manager_config(folder / 'experiment'))
    model = EncDecDenoiseMaskedTokenPredModel(cfg=model_config(shards, noise, validation), trainer=fitter)
    fitter.fit(model)
    model.save_to(str(folder / 'trained.nemo'))
    if rank == 0:
        metrics = {name: float(value) for name, value in fitter.callback_metrics.items()}
        (folder / 'validation.json').write_text(json.dumps(metrics))


if __name__ == '__main__':
    main(*sys.argv[1:])
