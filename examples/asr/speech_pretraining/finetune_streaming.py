# SPDX-License-Identifier: Apache-2.0
r"""Fine-tune a streaming encoder to recognise speech: CTC, RNNT or both, characters or word pieces.

    python finetune_streaming.py --config-name=streaming_ctc \
        init_from_nemo_model.pretrained.path=NEST.nemo \
        model.train_ds.manifest_filepath=train.json \
        model.validation_ds.manifest_filepath=validation.json \
        exp_manager.exp_dir=experiments

``--config-name=streaming_rnnt`` trains a transducer, ``streaming_hybrid`` a transducer and a CTC decoder. The output is
characters or, with ``model.tokenizer='{dir: TOKENIZER, type: bpe}'``, the word pieces of a tokenizer that NeMo's
``process_asr_text_tokenizer.py`` has made. Preprocessor and encoder have the settings of the pre-trained model, with its
contexts and layer contexts; ``model.preprocessor`` and ``model.encoder`` change single settings. To stream with the
.nemo, use ``StreamingSession`` or ``streaming_inference_example.py``. If you run the command of an interrupted run
again, it continues.
"""

from script_tools import fit_or_exit, require_patches, show_help

show_help(__doc__)
PATCHES_IN_USE = require_patches(
    __file__,
    'nemo.collections.asr.modules.conformer_encoder',
    'nemo.collections.asr.parts.preprocessing.features',
)

from pathlib import Path

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo.collections.asr.data.data_checks import check_data
from nemo.collections.asr.data.ssl_dataset import file_id, files_in, set_skip_bad_audio
from nemo.collections.asr.data.training_data_mixin import LogLeftOut
from nemo.collections.asr.data.transcripts import characters_known_by, characters_of, report_unknown_characters
from nemo.collections.asr.models import (
    EncDecCTCModel,
    EncDecCTCModelBPE,
    EncDecHybridRNNTCTCBPEModel,
    EncDecHybridRNNTCTCModel,
    EncDecRNNTBPEModel,
    EncDecRNNTModel,
)
from nemo.collections.asr.parts.ssl_reports.figures import look_ahead_title
from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.utils.manifest_index import expanded, is_remote, local_entries, paths_in
from nemo.collections.asr.parts.utils.pretraining_checks import check_contexts, check_known_keys
from nemo.collections.common.data.lhotse.nemo_adapters import NO_MEMBER
from nemo.core.classes.modelPT import ModelPT
from nemo.core.config import hydra_runner
from nemo.core.connectors.initial_weights import PLACES, sources_of
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from nemo.utils.left_out import LEFT_OUT, OUTSIDE_LIMITS
from nemo.utils.trainer_utils import resolve_trainer_cfg

DATA_SECTIONS = ('train_ds', 'validation_ds', 'test_ds')
TAKEN_OVER = ('preprocessor', 'encoder')  # sections of the pre-trained model's config


def prepare(cfg: DictConfig) -> DictConfig:
    """Check the config, take the pre-trained model's sections over, and fill in the characters.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    is_other_form = cfg.get('init_from_ptl_ckpt') or cfg.get('init_from_pretrained_model')
    if is_other_form and 'init_from_nemo_model.pretrained.path' in OmegaConf.missing_keys(cfg):
        cfg.init_from_nemo_model = None
    for kind, place in PLACES.items():
        if isinstance(cfg.get(kind), str):  # a recogniser has a decoder of its own
            with open_dict(cfg):
                cfg[kind] = {'pretrained': {place: cfg[kind], 'include': list(TAKEN_OVER)}}
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise ValueError(f"the config gives no value for {', '.join(sorted(missing))}")
    for section in DATA_SECTIONS[:2]:
        check_data(f'model.{section}', cfg.model[section])
    pretrained = pretrained_config(cfg)
    with open_dict(cfg):
        for section in TAKEN_OVER:
            cfg.model[section] = OmegaConf.merge(pretrained[section], cfg.model.get(section) or {})
        name_tokens(cfg.model)
        if 'model_defaults' in cfg.model:
            encoder = cfg.model.encoder
            cfg.model.model_defaults.enc_hidden = (
                encoder.d_model if encoder.get('feat_out', -1) < 1 else encoder.feat_out
            )
    check_known_keys(cfg)
    check_contexts(cfg.model.encoder)
    return cfg


def pretrained_config(cfg: DictConfig) -> DictConfig:
    """Return the config of the pre-trained model; where there are several, of the first.

    Raises:
        ValueError: if there is none, or it lacks a preprocessor or an encoder.
    """
    sources = sources_of(cfg)
    if not sources:
        raise ValueError(f"one of {', '.join(PLACES)} must name the pre-trained model")
    config = sources[0].read_config(ModelPT)
    lacking = [section for section in TAKEN_OVER if section not in config]
    if lacking:
        raise ValueError(f"{sources[0].key}: {sources[0].place} has no {' and no '.join(lacking)}")
    return config


def name_tokens(model: DictConfig) -> None:
    """Fill in what is recognised: characters, or the word pieces of a tokenizer.

    Raises:
        ValueError: as :func:`characters_of` does; if both are given; if the tokenizer's folder has no tokenizer.
    """
    if model.get('tokenizer') is None:
        model.pop('tokenizer', None)
        if model.labels is None:
            model.labels = characters_of(model.train_ds)
        for section in ('train_ds', 'validation_ds'):
            model[section].labels = model.labels
        return
    if model.labels is not None:
        raise ValueError("model.labels and model.tokenizer are both given; the tokens are of one of them")
    folder = model.tokenizer.get('dir')
    if folder is None or not Path(folder).is_dir():
        raise ValueError(f"model.tokenizer.dir is {folder}; it must be the folder of a tokenizer")
    model.pop('labels')
    for decoder in (model.decoder, model.get('aux_ctc', {}).get('decoder', {})):
        if 'num_classes' in decoder:  # of a CTC decoder
            decoder.num_classes, decoder.vocabulary = -1, []


def build(cfg: DictConfig):
    """Make the trainer and the model of the config, in the experiment's folder.

    Raises:
        ValueError: from any of them, naming what cannot work.
    """
    trainer = pl.Trainer(**resolve_trainer_cfg(cfg.trainer), callbacks=[LogLeftOut()])
    exp_manager(trainer, cfg.get('exp_manager', None))
    try:
        model = model_class(cfg.model)(cfg=cfg.model, trainer=trainer)
    except TypeError as error:
        if 'no len()' not in str(error):
            raise
        raise ValueError(
            f"trainer.limit_train_batches is {trainer.limit_train_batches}, and the data of model.train_ds have no length; set "
            "it to the number of batches of an epoch"
        ) from error
    model.maybe_init_from_pretrained_checkpoint(cfg)
    skip_bad_audio(model)
    for section in DATA_SECTIONS:
        if cfg.model.get(section):
            count_left_out(cfg.model[section])
            report_unknown_characters(f'model.{section}', cfg.model[section], characters_known_by(model))
    check_can_stream(model)
    contexts = (look_ahead_title(model, context) for context in model.encoder.att_context_size_all)
    logging.info(f"Attention contexts: {'; '.join(contexts)}")
    return trainer, model


def count_left_out(section) -> None:
    """Count what NeMo's own readers of manifests leave out: for its duration, or as no tar file has it."""
    if section.get('use_lhotse'):
        return  # which counts while it reads
    least, most = section.get('min_duration') or 0.0, section.get('max_duration') or float('inf')
    tars = [tar for path in paths_in(section.get('tarred_audio_filepaths')) for tar in expanded(path)]
    found = set().union(*map(files_in, tars)) if tars and not any(map(is_remote, tars)) else None
    left_out: dict[str, list[str]] = {OUTSIDE_LIMITS: [], NO_MEMBER: []}
    for line in local_entries(section.get('manifest_filepath')):
        if not least <= (line.entry.get('duration') or least) <= most:
            left_out[OUTSIDE_LIMITS].append(f"{line.place}: {line.entry['duration']} s")
        elif found is not None and file_id(str(line.audio)).partition('-sub')[0] not in found:
            left_out[NO_MEMBER].append(f"{line.place}: {line.audio}")
    for reason, entries in left_out.items():
        LEFT_OUT.add(reason, ''.join(entries[:1]), len(entries))


def skip_bad_audio(model) -> None:
    """Set what the data sections give as ``skip_bad_audio``, which NeMo's models do not read.

    Raises:
        ValueError: naming the section, if its data cannot skip bad audio.
    """
    loaders = {'train_ds': model._train_dl, 'validation_ds': model._validation_dl, 'test_ds': model._test_dl}
    for section, made in loaders.items():
        skip = (model.cfg.get(section) or {}).get('skip_bad_audio')
        for loader in [] if skip is None or made is None else made if isinstance(made, list) else [made]:
            try:
                set_skip_bad_audio(loader.dataset, skip)
            except ValueError as error:
                raise ValueError(f"model.{section}.{error}; with use_lhotse: true it can") from error


def model_class(cfg: DictConfig) -> type:
    """Return the class for the sections of a model's config: RNNT with a joint network, CTC, or both."""
    pieces = cfg.get('tokenizer') is not None
    if cfg.get('joint') is None:
        return EncDecCTCModelBPE if pieces else EncDecCTCModel
    if cfg.get('aux_ctc') is None:
        return EncDecRNNTBPEModel if pieces else EncDecRNNTModel
    return EncDecHybridRNNTCTCBPEModel if pieces else EncDecHybridRNNTCTCModel


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
    """Fine-tune by the config."""
    fit_or_exit(__file__, PATCHES_IN_USE, cfg, prepare, build)


if __name__ == "__main__":
    main()  # noqa: Hydra supplies the config
