# SPDX-License-Identifier: Apache-2.0
"""Trains tiny models under NeMo's exp_manager, each in a process of its own that faults may strike.

    python training_runs.py RUNS.json

``RUNS.json`` is a list of runs, each with ``folder``, ``corpus``, and if you like ``fault`` (the name of a function
here) and ``copy`` (where to copy the folder when the run has ended). NeMo is imported once; each run is a fork. The
exit status of each (negative: a signal) goes to standard output as a JSON list. A run appends the loss of each step to
``losses.jsonl`` in its folder.
"""

import json
import os
import resource
import shutil
import signal
import sys
import traceback
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

MAX_STEPS = 9
BATCHES_PER_EPOCH = 4
VALIDATE_EVERY = 2


class LossToFile(pl.Callback):
    """Appends (step, loss) to a file, and strikes before a step if told to."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open(self.path, 'a') as file:
            file.write(json.dumps([trainer.global_step, float(outputs['loss'])]) + '\n')


class Strike(pl.Callback):
    """Sends SIGKILL to its own process at the beginning of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            kill()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def in_training(run):
    """Kill the process in the middle of an epoch, between two checkpoints."""
    return [Strike(step=7)]


def while_a_checkpoint_is_written(run):
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
    return []


def before_the_old_last_checkpoint_is_removed(run):
    """Kill the process when the second last checkpoint is whole and the first still there."""
    remove = nemo_model_checkpoint.NeMoModelCheckpoint._remove_checkpoint

    def strike(self, trainer, filepath, *args, **kwargs):
        if filepath.endswith('last.ckpt'):
            kill()
        return remove(self, trainer, filepath, *args, **kwargs)

    nemo_model_checkpoint.NeMoModelCheckpoint._remove_checkpoint = strike
    return []


def while_a_nemo_file_is_packed(run):
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
    return []


class FullDisk(pl.Callback):
    """From a step on, no file can grow beyond some kilobytes, which is what a full disk looks like to a writer."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails, as it does on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def on_a_full_disk(run):
    """Let every large write fail after the first checkpoints."""
    return [FullDisk()]


def train(run: dict) -> None:
    """Train as a run says; goes on from the last checkpoint in its folder."""
    folder, corpus = Path(run['folder']), run['corpus']
    callbacks = [LossToFile(folder / 'losses.jsonl'), *(globals()[run['fault']](run) if run.get('fault') else [])]
    pl.seed_everything(1)
    fitter = trainer(
        MAX_STEPS,
        callbacks=callbacks,
        logger=False,
        limit_train_batches=BATCHES_PER_EPOCH,
        val_check_interval=VALIDATE_EVERY,
        limit_val_batches=1,
    )
    exp_manager(fitter, exp_manager_config(folder / 'experiment'))
    model = EncDecDenoiseMaskedTokenPredModel(cfg=model_config(corpus), trainer=fitter)
    fitter.fit(model)
    model.save_to(str(folder / 'trained.nemo'))


def exp_manager_config(folder: Path) -> dict:
    """The shipped config's checkpoints, which keep the best and the last, and a ``.nemo`` with each."""
    cfg = tiny_config().exp_manager
    with open_dict(cfg):
        cfg.explicit_log_dir, cfg.create_tensorboard_logger = str(folder), False
        cfg.exp_dir = cfg.name = None
    return cfg


def model_config(corpus: str):
    """The tiny model with a loader that shuffles, adds noise, and is resumable."""
    cfg = tiny_config().model
    with open_dict(cfg):
        cfg.validate_contexts = cfg.log_figures = None  # each run takes a second or two
        common = {'sample_rate': 16000, 'num_workers': 0, 'batch_size': 1}
        cfg.validation_ds = {'manifest_filepath': f'{corpus}/validation_manifest.json', 'shuffle': False, **common}
        cfg.train_ds = {'manifest_filepath': f'{corpus}/train_manifest.json', 'shuffle': True, **common}
        cfg.train_ds.update({'noise_manifest': f'{corpus}/noise_manifest.json', 'max_duration': 5.0})
        cfg.train_ds.resumable = {'seed': 3}
    return cfg


def in_a_fork(run: dict) -> int:
    """Train in a child process, its output in the run's folder; return its exit status."""
    Path(run['folder']).mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if run.get('copy'):
            shutil.copytree(run['folder'], run['copy'])
        return status
    log = os.open(Path(run['folder'], 'log.txt'), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        train(run)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == '__main__':
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps([in_a_fork(run) for run in json.loads(Path(sys.argv[1]).read_text())]), file=answers, flush=True)
