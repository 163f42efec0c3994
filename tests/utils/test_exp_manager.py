# SPDX-License-Identifier: Apache-2.0
"""A run that exp_manager resumes at the end of an epoch trains the batches of the next one, and none twice."""

import pytest
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from tiny_nest import batches, tiny_model, trainer

from nemo.utils.exp_manager import exp_manager

BATCHES = 3


class BatchesSeen(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx))


def train(folder, epochs: int) -> list:
    """Train up to so many epochs, going on where the folder's last checkpoint ended; returns the batches that came."""
    model, seen = tiny_model(), BatchesSeen()
    run = trainer(-1, max_epochs=epochs, logger=False, callbacks=[seen])
    settings = {
        'explicit_log_dir': str(folder),
        'create_tensorboard_logger': False,
        'create_checkpoint_callback': True,
        'checkpoint_callback_params': {'monitor': 'val_loss', 'save_top_k': 1},
        'resume_if_exists': True,
        'resume_ignore_no_checkpoint': True,
    }
    exp_manager(run, OmegaConf.create(settings))
    model.set_trainer(run)
    run.fit(model, train_dataloaders=batches(BATCHES), val_dataloaders=batches(1))
    return seen.seen


@pytest.mark.integration
def test_a_run_resumed_at_the_end_of_an_epoch_begins_the_next_one(tmp_path):
    assert train(tmp_path, epochs=1) == [(0, 0), (0, 1), (0, 2)]
    assert train(tmp_path, epochs=2) == [(1, 0), (1, 1), (1, 2)]
