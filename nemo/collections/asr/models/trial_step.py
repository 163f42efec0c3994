# SPDX-License-Identifier: Apache-2.0
"""Train one step on two seconds of noise, to check an installation. New in this project."""

import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from nemo.collections.asr.data.ssl_dataset import AudioNoiseBatch
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.utils import logging
from nemo_streaming_ssl import patch_tree

CONFIGS = Path(patch_tree()).resolve() / 'examples/asr/conf/ssl/nest'


def main() -> None:
    """Train the step and print what it took; exit with status 1 if it is wrong."""
    logging.setLevel(logging.ERROR)
    torch.manual_seed(0)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose('nest_fast-conformer_streaming_tiny', ['model.train_ds=null', 'model.validation_ds=null'])
    OmegaConf.resolve(cfg.model)
    audio, length = torch.randn(1, 32000) * 0.1, torch.tensor([32000])
    batch = AudioNoiseBatch(['noise'], audio, length, audio, length, audio, length)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(max_steps=1, devices=1, **quiet)
    began = time.perf_counter()
    trainer.fit(EncDecDenoiseMaskedTokenPredModel(cfg.model), DataLoader([batch], batch_size=None))
    seconds, loss = time.perf_counter() - began, float(trainer.callback_metrics['train_loss'])
    if not loss > 0.0:
        raise SystemExit(f'trial_step: error: the loss is {loss}')
    print(f'one step on {trainer.strategy.root_device} in {seconds:.1f} s, loss {loss:.2f}')


if __name__ == '__main__':
    main()
