# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny model as one of two ranks, with a fault on rank 1 if the run has one.

    LOCAL_RANK=0 rank_runs.py RUN FOLDER CORPUS & LOCAL_RANK=1 rank_runs.py RUN FOLDER CORPUS

with MASTER_ADDR, MASTER_PORT and WORLD_SIZE set. RUN is one of ``RUNS``. It leaves in FOLDER/RUN the batches of each
rank, ``steps-RANK.jsonl``, checkpoints, and where it ends well ``trained.nemo``.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf, open_dict
from tiny_nest import tiny_config
from torch.distributed.checkpoint import FileSystemWriter
from training_runs import managed_trainer

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.utils.trainer_utils import resolve_trainer_cfg

CONTEXTS = [[10, 0], [20, 0], [-1, 0]]
SHARDED = {
    '_target_': 'lightning.pytorch.strategies.ModelParallelStrategy',
    'data_parallel_size': 2,
    'tensor_parallel_size': 1,
    'save_distributed_checkpoint': False,
}
RUNS = {
    'plain': {},
    'sharded': {'strategy': SHARDED},
    'accumulated': {'accumulate_grad_batches': 2},
    'plain-half': {'max_steps': 2},
    'sharded-half': {'strategy': SHARDED, 'max_steps': 2},
    'folder-half': {'strategy': {**SHARDED, 'save_distributed_checkpoint': True}, 'max_steps': 2},
    'async-half': {'strategy': 'fully_shard', 'max_steps': 2},
    'async-killed': {'strategy': 'fully_shard', 'max_steps': 6, 'fault': 'writing'},
    'plain-rest': {'go_on': 'plain-half'},
    'sharded-rest': {'strategy': SHARDED, 'go_on': 'sharded-half'},
    'sharded-from-async': {'strategy': SHARDED, 'go_on': 'async-half'},
    'sharded-from-killed': {'strategy': SHARDED, 'go_on': 'async-killed'},
    'alone': {'go_on': 'plain-half', 'ranks': 1},
    'alone-from-folder': {'strategy': {**SHARDED, 'data_parallel_size': 1}, 'go_on': 'folder-half', 'ranks': 1},
    'unreadable': {'manifest': 'unreadable.json'},
    'unreadable-skipped': {'manifest': 'unreadable.json', 'skip_bad_audio': True},
    'samples': {'fault': 'samples'},
    'samples-skipped': {'fault': 'samples', 'skip_nan_grad': True},
    'gradients': {'fault': 'gradients'},
    'gradients-skipped': {'fault': 'gradients', 'skip_nan_grad': True},
    'empty': {'fault': 'empty'},
}


class Steps(pl.Callback):
    """Appends each batch to a file: step, loss, context and its utterances."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs['loss'] * trainer.accumulate_grad_batches  # Lightning divides it
        utterances = [round(float(audio.abs().sum())) for audio in batch.audio]  # who they are; dithered a little
        row = [trainer.global_step, float(loss), list(batch.att_context), utterances]
        with open(self.path, 'a') as file:
            file.write(json.dumps(row) + '\n')


class EndsWhileItWrites(pl.Callback):
    """Ends the rank when the second checkpoint is being written."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 3:
            FileSystemWriter.write_data = lambda *args: os._exit(9)


class OnRankOne(pl.Callback):
    """Causes a fault in the second batch of rank 1."""

    def __init__(self, fault: str):
        self.fault, self.batches = fault, 0

    def setup(self, trainer, pl_module, stage):
        """Let the model's hook get a bad batch."""
        check = pl_module.on_before_batch_transfer

        def spoil(batch, dataloader_idx):
            if pl_module.trainer.training and trainer.global_rank == 1 and self.batches == 1:
                if self.fault == 'samples':
                    batch.noisy_audio[0, 100] = float('nan')
                if self.fault == 'empty':
                    batch.audio = batch.audio[:0]
                batch.samples_are_checked = False  # as from a dataset that checks no samples
            return check(batch, dataloader_idx)

        pl_module.on_before_batch_transfer = spoil

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1
        if trainer.global_rank == 1 and self.batches == 2 and self.fault == 'gradients':
            weight = pl_module.encoder.pre_encode.out.bias
            weight.register_hook(lambda gradient: gradient * float('nan') if self.batches == 2 else gradient)


def model_config(run: dict, corpus: Path):
    """The tiny model in synced contexts; what is skipped as the run says."""
    cfg = tiny_config(f'model.encoder.att_context_size={CONTEXTS}', 'model.encoder.n_layers=2').model
    common = {'sample_rate': 16000, 'num_workers': 0, 'batch_size': 2}
    with open_dict(cfg):
        cfg.log_figures = cfg.validate_contexts = None
        cfg.validation_ds = {'manifest_filepath': str(corpus / 'short.json'), 'shuffle': False, **common}
        cfg.train_ds = {
            'manifest_filepath': str(corpus / run.get('manifest', 'short.json')),
            'shuffle': True,
            **common,
        }
        cfg.train_ds.update({'resumable': {'seed': 3}, 'skip_bad_audio': run.get('skip_bad_audio', False)})
        cfg.train_ds.synced_contexts = {'context_options': CONTEXTS, 'seed': 5}
        cfg.skip_nan_grad = run.get('skip_nan_grad', False)
        cfg.optim.sched.warmup_steps = 1
    return cfg


def train(name: str, folder: Path, corpus: Path, rank: int) -> None:
    """Train as a run says."""
    run = RUNS[name]
    fault = run.get('fault', '')
    pl.seed_everything(1)
    fitter = managed_trainer(
        folder / name,
        max_steps=run.get('max_steps', 4),
        val_check_interval=2 if 'max_steps' in run else 4,  # each is followed by checkpoints
        devices=run.get('ranks', 2),
        strategy=resolve_trainer_cfg(OmegaConf.create({'strategy': run.get('strategy', 'ddp')}))['strategy'],
        accumulate_grad_batches=run.get('accumulate_grad_batches', 1),
        callbacks=[
            Steps(folder / name / f'steps-{rank}.jsonl'),
            EndsWhileItWrites() if fault == 'writing' else OnRankOne(fault),
        ],
        async_save=run.get('strategy') == 'fully_shard',
        check_val_every_n_epoch=None,
        use_distributed_sampler=True,
    )
    model = EncDecDenoiseMaskedTokenPredModel(cfg=model_config(run, corpus), trainer=fitter)
    before = run.get('go_on')
    last = before and max((folder / before / 'experiment/checkpoints').glob('*last.ckpt'))
    fitter.fit(model, ckpt_path=last)
    model.save_to(str(folder / name / 'trained.nemo'))


if __name__ == '__main__':
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(os.environ['LOCAL_RANK']))
