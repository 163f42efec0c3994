# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny model under NeMo's exp_manager; goes on from the last checkpoint in its folder.

    python training_runs.py FOLDER CORPUS [FAULT]

FAULT is the name of a function here. The loss of each step is appended to FOLDER/losses.jsonl; a run that ends well
leaves FOLDER/trained.nemo.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as pl
import torch
from omegaconf import open_dict
from tiny_nest import tiny_config, trainer

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.core.connectors import save_restore_connector
from nemo.utils.callbacks import nemo_model_checkpoint
from nemo.utils.exp_manager import exp_manager


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Strike(pl.Callback):
    """Sends SIGKILL to its own process at the beginning of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            kill()


def in_training():
    """Kill the process in the middle of an epoch, between two checkpoints."""
    return Strike(step=7)


def while_a_checkpoint_is_written():
    """Kill the process when half of the third checkpoint's bytes are on the disk."""
    save, count = torch.save, [0]

    def half(content, file):
        count[0] += 'optimizer_states' in content
        if count[0] < 3:
            return save(content, file)
        file.write(b'half a checkpoint' * 1000)
        file.flush()
        kill()

    torch.save = half


def before_the_old_last_checkpoint_is_removed():
    """Kill the process when the second last checkpoint is whole and the first still exists."""
    checkpoint = nemo_model_checkpoint.NeMoModelCheckpoint
    remove = checkpoint._remove_checkpoint

    def strike(self, trainer, filepath, *args, **kwargs):
        if filepath.endswith('last.ckpt'):
            kill()
        return remove(self, trainer, filepath, *args, **kwargs)

    checkpoint._remove_checkpoint = strike


def while_a_nemo_file_is_packed():
    """Kill the process when half of the third ``.nemo`` file is packed."""
    stock, count = save_restore_connector._up.SaveRestoreConnector, [0]
    pack = stock._make_nemo_file_from_folder

    def half(filename, source_dir):
        count[0] += 1
        pack(filename, source_dir)
        if count[0] == 3:
            os.truncate(filename, os.path.getsize(filename) // 2)
            kill()

    stock._make_nemo_file_from_folder = staticmethod(half)


class FullDisk(pl.Callback):
    """From a step on, no file can grow beyond some kilobytes, which a writer sees as it sees a full disk."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails, as it does on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


on_a_full_disk = FullDisk


class LossToFile(pl.Callback):
    """Appends (step, loss) to a file."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open(self.path, 'a') as file:
            file.write(json.dumps([trainer.global_step, float(outputs['loss'])]) + '\n')


def managed_trainer(folder: Path, async_save: bool = False, **settings) -> pl.Trainer:
    """Make a trainer that validates every two steps, with the shipped config's checkpoints: best, last, ``.nemo``."""
    made = trainer(**{**dict(logger=False, val_check_interval=2, limit_val_batches=1), **settings})
    cfg, folder = tiny_config().exp_manager, str(folder / 'experiment')
    with open_dict(cfg):
        cfg.update(explicit_log_dir=folder, create_tensorboard_logger=False, exp_dir=None, name=None)
        cfg.seconds_to_sleep = 0.5  # of other ranks, while the first makes its folders
        cfg.checkpoint_callback_params.async_save = async_save
    exp_manager(made, cfg)
    return made


def model_config(corpus: str):
    """The tiny model with a loader that shuffles, adds noise, and is resumable."""
    cfg = tiny_config().model
    common = {'sample_rate': 16000, 'num_workers': 0, 'batch_size': 1}
    with open_dict(cfg):
        cfg.validate_contexts = cfg.log_figures = None
        cfg.validation_ds = {'manifest_filepath': f'{corpus}/validation_manifest.json', 'shuffle': False, **common}
        cfg.train_ds = {'manifest_filepath': f'{corpus}/train_manifest.json', 'shuffle': True, **common}
        cfg.train_ds.update({'noise_manifest': f'{corpus}/noise_manifest.json', 'max_duration': 5.0})
        cfg.train_ds.resumable = {'seed': 3}
    return cfg


def main(folder: Path, corpus: str, fault: str = '') -> None:
    """Train, and cause the fault."""
    callbacks = [LossToFile(folder / 'losses.jsonl'), globals()[fault]() if fault else None]
    callbacks = [callback for callback in callbacks if callback is not None]
    pl.seed_everything(1)
    fitter = managed_trainer(folder, max_steps=9, callbacks=callbacks, limit_train_batches=4)
    model = EncDecDenoiseMaskedTokenPredModel(cfg=model_config(corpus), trainer=fitter)
    fitter.fit(model)
    model.save_to(str(folder / 'trained.nemo'))


if __name__ == '__main__':
    main(Path(sys.argv[1]), *sys.argv[2:])
