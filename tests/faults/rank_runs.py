# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny model as one of two ranks, with a fault on rank 1 if the run has one.

    LOCAL_RANK=0 rank_runs.py RUN FOLDER CORPUS & LOCAL_RANK=1 rank_runs.py RUN FOLDER CORPUS

with MASTER_ADDR, MASTER_PORT and WORLD_SIZE set. ``RUN`` is one of ``RUNS``. It leaves in FOLDER/RUN the batches of each
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
from tiny_nest import tiny_config, trainer
from training_runs import exp_manager_config

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.utils.exp_manager import exp_manager
from nemo.utils.trainer_utils import resolve_trainer_cfg

CONTEXTS = [[10, 0], [20, 0], [-1, 0]]
STEPS = 4
SHARDED = {
    '_target_': 'lightning.pytorch.strategies.ModelParallelStrategy',
    'data_parallel_size': 2,
    'tensor_parallel_size': 1,
    'save_distributed_checkpoint': False,
}


class Steps(pl.Callback):
    """Writes down each batch: step, loss, context, its utterances, and the norm of a weight."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs['loss'] * trainer.accumulate_grad_batches  # Lightning divides it
        utterances = [round(float(audio.abs().sum())) for audio in batch.audio]  # who they are; dithered a little
        row = [trainer.global_step, float(loss), list(batch.att_context), utterances]
        with open(self.path, 'a') as file:
            file.write(json.dumps(row) + '\n')


class OnRankOne(pl.Callback):
    """Causes a fault in the second batch of rank 1."""

    def __init__(self, fault: str):
        self.fault, self.batches = fault, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1
        if trainer.global_rank == 1 and self.batches == 2 and self.fault == 'gradients':
            pl_module.encoder.pre_encode.out.bias.register_hook(self._spoil)

    def _spoil(self, gradient):
        if self.batches == 2:
            return gradient * float('nan')

    def before_transfer(self, model):
        """Return what stands in for the model's hook: it spoils the batch, and passes it on."""
        check = model.on_before_batch_transfer

        def spoil(batch, dataloader_idx):
            if model.trainer.training and model.global_rank == 1 and self.batches == 1:
                if self.fault == 'samples':
                    batch.noisy_audio[0, 100] = float('nan')
                if self.fault == 'empty':
                    batch.audio = batch.audio[:0]
                batch.samples_are_checked = False  # as from a dataset that checks no samples
            return check(batch, dataloader_idx)

        return spoil


RUNS = {
    'plain': {},
    'sharded': {'strategy': SHARDED},
    'accumulated': {'accumulate_grad_batches': 2},
    'plain-half': {'max_steps': 2},
    'sharded-half': {'strategy': SHARDED, 'max_steps': 2},
    'plain-rest': {'go_on': 'plain-half'},
    'sharded-rest': {'strategy': SHARDED, 'go_on': 'sharded-half'},
    'alone': {'go_on': 'plain-half', 'ranks': 1},
    'alone-from-sharded': {'go_on': 'sharded-half', 'ranks': 1},
    'folder-half': {'strategy': {**SHARDED, 'save_distributed_checkpoint': True}, 'max_steps': 2},
    'sharded-from-folder': {'strategy': SHARDED, 'go_on': 'folder-half'},
    'alone-from-folder': {'strategy': {**SHARDED, 'data_parallel_size': 1}, 'go_on': 'folder-half', 'ranks': 1},
    'unreadable': {'manifest': 'unreadable.json'},
    'unreadable-skipped': {'manifest': 'unreadable.json', 'model.train_ds.skip_bad_audio': True},
    'samples': {'fault': 'samples'},
    'samples-skipped': {'fault': 'samples', 'model.skip_nan_grad': True},
    'gradients': {'fault': 'gradients'},
    'gradients-skipped': {'fault': 'gradients', 'model.skip_nan_grad': True},
    'empty': {'fault': 'empty'},
}


def model_config(run: dict, corpus: Path):
    """The tiny model in synced contexts; what is skipped as the run says."""
    cfg = tiny_config(f'model.encoder.att_context_size={CONTEXTS}', 'model.encoder.n_layers=2').model
    with open_dict(cfg):
        cfg.log_figures = cfg.validate_contexts = None
        common = {'sample_rate': 16000, 'num_workers': 0, 'batch_size': 2}
        cfg.validation_ds = {'manifest_filepath': str(corpus / 'short.json'), 'shuffle': False, **common}
        cfg.train_ds = {
            'manifest_filepath': str(corpus / run.get('manifest', 'short.json')),
            'shuffle': True,
            'resumable': {'seed': 3},
            'synced_contexts': {'context_options': CONTEXTS, 'seed': 5},
            'skip_bad_audio': run.get('model.train_ds.skip_bad_audio', False),
            **common,
        }
        cfg.skip_nan_grad = run.get('model.skip_nan_grad', False)
        cfg.optim.sched.warmup_steps = 1
    return cfg


def train(name: str, folder: Path, corpus: Path, rank: int) -> None:
    """Train as a run says."""
    run = RUNS[name]
    fault = OnRankOne(run.get('fault', ''))
    strategy = resolve_trainer_cfg(OmegaConf.create({'strategy': run.get('strategy', 'ddp')}))['strategy']
    pl.seed_everything(1)
    fitter = trainer(
        run.get('max_steps', STEPS),
        devices=run.get('ranks', 2),
        strategy=strategy,
        accumulate_grad_batches=run.get('accumulate_grad_batches', 1),
        callbacks=[Steps(folder / name / f'steps-{rank}.jsonl'), fault],
        logger=False,
        enable_checkpointing=False,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        use_distributed_sampler=True,
    )
    exp_manager(fitter, exp_manager_config(folder / name / 'experiment'))
    model = EncDecDenoiseMaskedTokenPredModel(cfg=model_config(run, corpus), trainer=fitter)
    model.on_before_batch_transfer = fault.before_transfer(model)
    before = run.get('go_on')
    last = before and max((folder / before / 'experiment/checkpoints').glob('*last.ckpt'))
    fitter.fit(model, ckpt_path=last)
    model.save_to(str(folder / name / 'trained.nemo'))


if __name__ == '__main__':
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(os.environ['LOCAL_RANK']))
