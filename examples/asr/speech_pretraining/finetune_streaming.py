# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Fine-tune a pre-trained streaming encoder to recognise speech, by CTC or RNNT over characters.

    python finetune_streaming.py --config-name=streaming_ctc \
        init_from_nemo_model.pretrained.path=NEST.nemo \
        model.train_ds.manifest_filepath=train.json \
        model.validation_ds.manifest_filepath=validation.json \
        exp_manager.exp_dir=experiments

``--config-name=streaming_rnnt`` makes a transducer. The preprocessor and the encoder are built as those of the
pre-trained model, so features and contexts, those of the layers included, are what the weights have learned;
``model.preprocessor`` and ``model.encoder`` replace single settings. The .nemo that results is streamed by
``StreamingSession`` and ``streaming_inference_example.py``. A run that was interrupted goes on where it was.
"""

REQUIRED_PATCHES = (
    'nemo.collections.asr.modules.conformer_encoder',
    'nemo.collections.asr.parts.preprocessing.features',
)
try:  # first of all: on stock NeMo the imports below would fail with less to say
    from nemo_streaming_ssl.report import require_active

    PATCHES_IN_USE = require_active(*REQUIRED_PATCHES)
except (ImportError, RuntimeError) as error:
    raise SystemExit(f"finetune_streaming needs the patches of nemo-streaming-ssl: {error}") from error

import json
import tarfile
from pathlib import Path

import lightning.pytorch as pl
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo.collections.asr.models import EncDecCTCModel, EncDecRNNTModel
from nemo.collections.asr.parts.att_context import StreamingSession
from nemo.collections.asr.parts.utils.pretraining_checks import check_contexts, check_data, check_known_keys
from nemo.core.classes.modelPT import ModelPT
from nemo.core.config import hydra_runner
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from nemo.utils.trainer_utils import resolve_trainer_cfg

TAKEN_OVER = ('preprocessor', 'encoder')  # sections of the pre-trained model's config


def prepare(cfg: DictConfig) -> DictConfig:
    """Check the config, take the pre-trained model's sections over, and fill in the characters.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise ValueError(f"the config gives no value for {', '.join(sorted(missing))}")
    for section in ('train_ds', 'validation_ds'):
        check_data(f'model.{section}', cfg.model[section])
    pretrained = pretrained_config(cfg)
    with open_dict(cfg):
        for section in TAKEN_OVER:
            cfg.model[section] = OmegaConf.merge(pretrained[section], cfg.model.get(section) or {})
        if cfg.model.labels is None:
            cfg.model.labels = characters(cfg.model.train_ds)
        for section in ('train_ds', 'validation_ds'):
            cfg.model[section].labels = cfg.model.labels
        if 'model_defaults' in cfg.model:
            encoder = cfg.model.encoder
            cfg.model.model_defaults.enc_hidden = (
                encoder.d_model if encoder.get('feat_out', -1) < 1 else encoder.feat_out
            )
    check_known_keys(cfg.model)
    check_contexts(cfg.model.encoder)
    return cfg


def pretrained_config(cfg: DictConfig) -> DictConfig:
    """Return the config of the pre-trained model.

    Raises:
        ValueError: if there is none, or it lacks what is taken over.
    """
    name, path = 'init_from_nemo_model.pretrained.path', cfg.init_from_nemo_model.pretrained.path
    if not Path(path).is_file():
        raise ValueError(f"{name}: no file {path}")
    try:
        config = ModelPT.restore_from(str(path), return_config=True)
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise ValueError(f"{name}: NeMo cannot read {path}: {error!r}") from error
    lacking = [section for section in TAKEN_OVER if section not in config]
    if lacking:
        raise ValueError(f"{name}: the model of {path} has no {' and no '.join(lacking)}")
    return config


def characters(train_ds: DictConfig) -> list[str]:
    """Return the characters of the training manifests' texts, sorted.

    Raises:
        ValueError: if an utterance has no text, or no manifest can be read for them.
    """
    paths = train_ds.manifest_filepath
    if train_ds.get('is_tarred') or train_ds.get('use_lhotse') or not isinstance(paths, str):
        raise ValueError("model.labels is null, which takes the characters of one plain manifest; give a list")
    found = set()
    for path in paths.split(','):
        for number, line in enumerate(Path(path).read_text(encoding='utf-8').splitlines(), start=1):
            text = json.loads(line).get('text') if line.strip() else ''
            if text is None:
                raise ValueError(f"model.train_ds.manifest_filepath: {path}, line {number} has no text")
            found |= set(text)
    if not found:
        raise ValueError(f"model.train_ds.manifest_filepath: the texts of {paths} are empty")
    return sorted(found)


def build(cfg: DictConfig):
    """Make the trainer and the model that the config asks for, in the experiment's folder.

    Raises:
        ValueError: from any of them, naming what cannot work.
    """
    trainer = pl.Trainer(**resolve_trainer_cfg(cfg.trainer))
    exp_manager(trainer, cfg.get('exp_manager', None))
    transducer = cfg.model.get('joint') is not None
    model = (EncDecRNNTModel if transducer else EncDecCTCModel)(cfg=cfg.model, trainer=trainer)
    model.maybe_init_from_pretrained_checkpoint(cfg)
    check_can_stream(model)
    return trainer, model


def check_can_stream(model) -> None:
    """Raise ValueError, with the reason, if the model could not be streamed when it is done."""
    modules = model.preprocessor, model.encoder
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        StreamingSession(model)
    finally:
        for module, was in zip(modules, training):
            module.train(was)


@hydra_runner(config_path="../conf/ssl/finetune", config_name="streaming_ctc")
def main(cfg: DictConfig) -> None:
    """Train as configured; ends with one message, before any training, if the config cannot work."""
    logging.info("\n".join(PATCHES_IN_USE))
    try:
        cfg = prepare(cfg)
        logging.info(f"Hydra config:\n{OmegaConf.to_yaml(cfg)}")
        if cfg.get('seed') is not None:
            pl.seed_everything(cfg.seed, workers=True)
        trainer, model = build(cfg)
    except (ValueError, OSError, InstantiationException) as error:
        raise SystemExit(f"finetune_streaming: {error}") from error
    trainer.fit(model)


if __name__ == "__main__":
    main()  # noqa: Hydra supplies the config
