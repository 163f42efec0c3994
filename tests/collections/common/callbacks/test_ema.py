# SPDX-License-Identifier: Apache-2.0
"""A run that averages its weights is resumed with its averages."""

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from tiny_nest import batches, tiny_model, trainer

from nemo.collections.asr.parts.utils.pretraining_checks import check_averaging
from nemo.utils.exp_manager import exp_manager


class Averages(pl.Callback):
    """Keeps the averages that training begins with, and those that it ends with."""

    def on_train_start(self, trainer, model):
        self.first = [average.clone() for average in trainer.optimizers[0].ema_params]

    def on_train_end(self, trainer, model):
        trainer.optimizers[0].join()
        self.last = [average.clone() for average in trainer.optimizers[0].ema_params]


def train(folder, steps):
    averages = Averages()
    run = trainer(steps, callbacks=[averages], logger=False, limit_val_batches=0)
    checkpoints = dict(
        save_top_k=1, monitor='train_loss', every_n_epochs=None, every_n_train_steps=1, always_save_nemo=False
    )
    settings = dict(
        explicit_log_dir=str(folder),
        resume_if_exists=True,
        resume_ignore_no_checkpoint=True,
        create_tensorboard_logger=False,
        create_checkpoint_callback=True,
        checkpoint_callback_params=checkpoints,
        ema=dict(enable=True, decay=0.5),
    )
    exp_manager(run, OmegaConf.create(settings))
    run.fit(tiny_model(trainer=run), train_dataloaders=batches(4))
    assert run.global_step == steps
    return averages


def test_a_run_with_averaged_weights_is_resumed(tmp_path):
    first = train(tmp_path, 2)
    second = train(tmp_path, 4)
    assert len(second.first) == len(first.last) > 0
    for before, after in zip(first.last, second.first):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    'strategy', ['fsdp', 'fully_shard', {'_target_': 'lightning.pytorch.strategies.ModelParallelStrategy'}]
)
def test_averaged_and_sharded_weights_are_refused(strategy):
    cfg = OmegaConf.create({'trainer': {'strategy': strategy}, 'exp_manager': {'ema': {'enable': True}}})
    with pytest.raises(ValueError, match='exp_manager.ema.enable is true with trainer.strategy'):
        check_averaging(cfg)
    cfg.exp_manager.ema.enable = False
    check_averaging(cfg)
