# SPDX-License-Identifier: Apache-2.0
"""A denoising model of the shipped streaming config in a size for tests, data for it, and a training run."""

import functools
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from nemo.collections.asr.data.ssl_dataset import AudioNoiseBatch
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

CONFIGS = Path(__file__).resolve().parents[1] / 'examples/asr/conf/ssl/nest'
SAMPLE_RATE = 16000
SMALL = [
    'model.encoder.n_layers=1',
    'model.encoder.d_model=16',
    'model.encoder.n_heads=2',
    'model.encoder.subsampling_conv_channels=8',
    'model.num_classes=32',
    'model.train_ds.manifest_filepath=null',
    'model.validation_ds.manifest_filepath=null',
]
POST_CONV = ('model.mask_position=post_conv', 'model.quantizer.combine_time_steps=1', 'model.loss.decoder_offset=0')
POSITIONS = pytest.mark.parametrize('position', [(), POST_CONV], ids=['pre_conv', 'post_conv'])
PRESETS = 'model.encoder.att_context_size=[[80,0],[160,0],[240,0],[320,0],[-1,0]]'
HIERARCHY = ('model.encoder.n_layers=3', '+model.encoder.layer_att_context_size=[[0,[4,0]],[2,[9,0]]]')
TWO_LAYERS = ('model.encoder.n_layers=2', '+model.encoder.layer_att_context_size=[[10,0],[20,0]]')
# What stock NeMo does not know goes; what streams becomes offline.
STOCK = (
    '~model.target_normalize',
    '~model.validate_contexts',
    '~model.validation_masks',
    '~model.audit_every_n_batches',
    '~model.log_figures',
    '~model.encoder.att_context_seed',
    '~model.encoder.blockwise_attention',
    '~model.loss.decoder_offset',
    '~model.masking.causal',
    'model.preprocessor.normalize=per_feature',
)
STOCK_OFFLINE = (
    *STOCK,
    'model.encoder.causal_downsampling=false',
    'model.encoder.conv_context_size=null',
    'model.encoder.conv_norm_type=batch_norm',
    'model.encoder.att_context_size=[-1,-1]',
)


def tiny_config(*overrides: str, name: str = 'nest_fast-conformer_streaming_tiny') -> DictConfig:
    """Return a shipped config, shrunk and without its data."""
    return pickle.loads(_overridden(name, overrides))


@functools.cache
def _overridden(name: str, overrides: tuple[str, ...]) -> bytes:
    """Apply overrides as Hydra does, to a config that it composed before; once for all who ask for the same."""
    cfg = pickle.loads(_composed(name))
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides([*overrides]), cfg)
    OmegaConf.resolve(cfg)
    del cfg.model.train_ds, cfg.model.validation_ds
    return pickle.dumps(cfg)


@functools.cache
def _composed(name: str) -> bytes:
    """Compose with Hydra, which takes longer than to build the model."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return pickle.dumps(compose(name, overrides=SMALL))


def tiny_model(*overrides: str, cls=EncDecDenoiseMaskedTokenPredModel, seed: int = 0, **kwargs):
    """Build a model from :func:`tiny_config`, with the same weights for the same seed."""
    torch.manual_seed(seed)
    return cls(tiny_config(*overrides).model, **kwargs)


def restored_weights(path) -> dict[str, torch.Tensor]:
    """The weights of a denoising model in a ``.nemo`` file."""
    return EncDecDenoiseMaskedTokenPredModel.restore_from(str(path), map_location='cpu').state_dict()


def noise_batch(seconds=(1.0, 0.6), seed: int = 0) -> AudioNoiseBatch:
    """A batch of coloured noise, one utterance for each length in seconds; clean and noisy signals differ."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([int(length * SAMPLE_RATE) for length in seconds])
    audio = torch.randn(len(seconds), int(lengths.max()), generator=generator).cumsum(dim=1) * 0.01
    audio = audio * (torch.arange(audio.shape[1]) < lengths.unsqueeze(1))
    noise = torch.randn(audio.shape, generator=generator) * 0.001
    return AudioNoiseBatch(
        sample_id=[str(index) for index in range(len(seconds))],
        audio=audio,
        audio_len=lengths,
        noise=noise,
        noise_len=lengths,
        noisy_audio=audio + noise,
        noisy_audio_len=lengths,
    )


def signals(batch: AudioNoiseBatch) -> dict:
    """Return the clean and noisy signals of a batch as the arguments of a denoising model's forward."""
    return dict(
        input_signal=batch.audio,
        input_signal_length=batch.audio_len,
        noisy_input_signal=batch.noisy_audio,
        noisy_input_signal_length=batch.noisy_audio_len,
    )


def batches(count: int, seconds=(1.0, 0.6), as_tuples: bool = False) -> DataLoader:
    """A data loader of :func:`noise_batch`, each with other content."""
    made = [noise_batch(seconds, seed) for seed in range(count)]
    made = [(batch.audio, batch.audio_len) for batch in made] if as_tuples else made
    return DataLoader(made, batch_size=None)


class RecordingLogger(DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None, **kwargs):
        self.steps.setdefault(step, {}).update(metrics)

    def column(self, name: str) -> list[float]:
        """The values of a metric, in the order of the steps that have it."""
        return [metrics[name] for _, metrics in sorted(self.steps.items()) if name in metrics]


def trainer(max_steps: int, **kwargs) -> pl.Trainer:
    """A quiet CPU trainer that logs every step to a :class:`RecordingLogger`."""
    settings = dict(
        max_steps=max_steps,
        accelerator='cpu',
        devices=1,
        logger=RecordingLogger(),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    return pl.Trainer(**{**settings, **kwargs})


def fit(model, loader, max_steps: int, ckpt_path=None, **kwargs) -> pl.Trainer:
    """Train for a number of steps and return the trainer, whose ``logger`` has the record."""
    run = trainer(max_steps, **kwargs)
    model.set_trainer(run)
    run.fit(model, train_dataloaders=loader, ckpt_path=ckpt_path)
    return run
