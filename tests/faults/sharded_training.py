# SPDX-License-Identifier: Apache-2.0
"""Trains on shards, on two ranks of the agent behind torchrun; ranks that it starts again go on from the last checkpoint.

    sharded_training.py FOLDER DATA RESTARTS [STRIKE]

At the beginning of step STRIKE rank 1 kills itself, if it was not started before. Each rank leaves its batches in
FOLDER/steps-RANK.jsonl; rank 0 leaves FOLDER/trained.nemo and FOLDER/metrics.json.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as pl
import torch
from omegaconf import open_dict
from rank_runs import CONTEXTS, Steps
from tiny_nest import tiny_config
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training_runs import Strike, managed_trainer

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel


def model_config(data: str):
    """The tiny model on shards, in synced contexts, validated in every context."""
    contexts = f'model.encoder.att_context_size={CONTEXTS}'
    cfg = tiny_config(contexts, name='nest_fast-conformer_streaming_lhotse_tiny').model
    common = {'sample_rate': 16000, 'num_workers': 2, 'batch_size': 2}
    with open_dict(cfg):
        cfg.log_figures = False
        cfg.validation_ds = {'manifest_filepath': f'{data}/validation.json', 'shuffle': False, **common}
        cfg.train_ds = {'use_lhotse': True, 'shar_path': f'{data}/train/shar', 'noise_manifest': f'{data}/noise/shar'}
        cfg.train_ds.update({'shuffle': True, 'shuffle_buffer_size': 20, 'max_duration': 20.0, **common})
        cfg.train_ds.resumable = {'seed': 3}
        cfg.train_ds.synced_contexts = {'context_options': CONTEXTS, 'seed': 5}
    return cfg


def train(folder: Path, data: str, strike: int) -> None:
    """Train, or go on, as one of the ranks."""
    rank, first_start = int(os.environ['RANK']), os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
    pl.seed_everything(1)
    torch.set_num_threads(1)
    fitter = managed_trainer(
        folder,
        max_steps=9,
        devices=int(os.environ['WORLD_SIZE']),
        strategy='ddp',
        callbacks=[Steps(folder / f'steps-{rank}.jsonl'), *([Strike(strike)] if first_start and rank == 1 else [])],
        check_val_every_n_epoch=None,
        limit_val_batches=2,
    )
    model = EncDecDenoiseMaskedTokenPredModel(cfg=model_config(data), trainer=fitter)
    fitter.fit(model)
    model.save_to(str(folder / 'trained.nemo'))
    if rank == 0:
        metrics = {name: float(value) for name, value in fitter.callback_metrics.items()}
        metrics['restarts'] = int(os.environ['TORCHELASTIC_RESTART_COUNT'])
        (folder / 'metrics.json').write_text(json.dumps(metrics))


def main(folder: str, data: str, restarts: str, strike: str = '-1') -> None:
    """Start the ranks as ``torchrun --standalone`` does, but as forks of this process."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend='c10d',
        rdzv_endpoint='localhost:0',
        run_id=Path(folder).name,
        max_restarts=int(restarts),
        monitor_interval=0.1,
        start_method='fork',
    )
    elastic_launch(config, train)(Path(folder), data, int(strike))


if __name__ == '__main__':
    main(*sys.argv[1:])
