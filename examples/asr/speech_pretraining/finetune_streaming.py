# SPDX-License-Identifier: Apache-2.0
r"""Fine-tune a streaming encoder to recognise speech: CTC, RNNT or both, characters or word pieces.

    python finetune_streaming.py --config-name=streaming_ctc \
        init_from_nemo_model.pretrained.path=NEST.nemo exp_manager.exp_dir=experiments \
        model.train_ds.manifest_filepath=train.json model.validation_ds.manifest_filepath=validation.json

``--config-name=streaming_rnnt`` trains a transducer, ``streaming_hybrid`` a transducer and a CTC decoder. The output is
characters or, with ``model.tokenizer='{dir: TOKENIZER, type: bpe}'``, the word pieces of a tokenizer that NeMo's
``process_asr_text_tokenizer.py`` has made. Preprocessor, encoder and contexts are those of the pre-trained model;
``model.preprocessor`` and ``model.encoder`` change single settings. To continue an interrupted run, run it again.
"""

from script_tools import fit_or_exit, make_trainer, require_patches, show_help

show_help(__doc__)
PATCHES_IN_USE = require_patches(__file__)

from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo.collections.asr import models
from nemo.collections.asr.data.audio_files import entries_within
from nemo.collections.asr.data.data_checks import characters_of, check_data, report_unknown_characters
from nemo.collections.asr.data.ssl_dataset import file_id, files_in, set_skip_bad_audio
from nemo.collections.asr.data.training_data_mixin import LogLeftOut
from nemo.collections.asr.parts.att_context.receptive_field import context_table
from nemo.collections.asr.parts.ssl_reports.figures import attention_frame_ms
from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.utils.manifest_index import expanded, is_remote, local_entries, paths_in
from nemo.collections.asr.parts.utils.pretraining_checks import check_contexts, check_known_keys
from nemo.collections.common.data.lhotse.nemo_adapters import NO_MEMBER
from nemo.core.classes.modelPT import ModelPT
from nemo.core.config import hydra_runner
from nemo.core.connectors.initial_weights import PLACES, sources_of
from nemo.utils import logging
from nemo.utils.left_out import LEFT_OUT

DATA_SECTIONS = ('train_ds', 'validation_ds', 'test_ds')
TAKEN_OVER = ('preprocessor', 'encoder')  # sections of the pre-trained model's config


def prepare(cfg: DictConfig) -> DictConfig:
    """Check the config, take over the pre-trained model's sections, and fill in the characters.

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
            width = cfg.model.encoder.get('feat_out', -1)
            cfg.model.model_defaults.enc_hidden = width if width > 0 else cfg.model.encoder.d_model
    check_known_keys(cfg)
    check_contexts(cfg.model.encoder)
    return cfg


def pretrained_config(cfg: DictConfig) -> DictConfig:
    """Return the config of the pre-trained model, the first of several; ValueError if it cannot be used."""
    sources = sources_of(cfg)
    if not sources:
        raise ValueError(f"one of {', '.join(PLACES)} must name the pre-trained model")
    config = sources[0].read_config(ModelPT)
    lacking = [section for section in TAKEN_OVER if section not in config]
    if lacking:
        raise ValueError(f"{sources[0].key}: {sources[0].place} has no {' and no '.join(lacking)}")
    return config


def name_tokens(model: DictConfig) -> None:
    """Fill in the characters, or prepare for a tokenizer's word pieces; ValueError if it has no folder."""
    if model.get('tokenizer') is None:
        model.pop('tokenizer', None)
        if model.labels is None:
            model.labels = characters_of(model.train_ds)
        for section in DATA_SECTIONS[:2]:
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
    """Make trainer and model in the experiment's folder; ValueError if one cannot work or stream."""
    trainer = make_trainer(cfg, LogLeftOut())
    try:
        model = model_class(cfg.model)(cfg=cfg.model, trainer=trainer)
    except TypeError as error:
        if 'no len()' not in str(error):
            raise
        limit = f"trainer.limit_train_batches is {trainer.limit_train_batches}"
        raise ValueError(
            f"{limit}, and model.train_ds has no length; set the number of batches of an epoch"
        ) from error
    model.maybe_init_from_pretrained_checkpoint(cfg)
    for section, loaders in zip(DATA_SECTIONS, (model._train_dl, model._validation_dl, model._test_dl)):
        if loaders is not None:
            key, data = f'model.{section}', cfg.model[section]
            set_skipping(key, data.get('skip_bad_audio'), loaders)
            if not data.get('use_lhotse'):  # which counts while it reads
                count_left_out(data)
            report_unknown_characters(key, data, model)
    model.eval()
    StreamingSession(model)  # raises, with the reason, if the model could not be streamed
    model.train()
    logging.info(context_table(model.encoder, attention_frame_ms(model)))
    return trainer, model


def model_class(cfg: DictConfig) -> type:
    """Return the class for the sections of a model's config: RNNT with a joint network, CTC, or both."""
    pieces = cfg.get('tokenizer') is not None
    if cfg.get('joint') is None:
        return models.EncDecCTCModelBPE if pieces else models.EncDecCTCModel
    if cfg.get('aux_ctc') is None:
        return models.EncDecRNNTBPEModel if pieces else models.EncDecRNNTModel
    return models.EncDecHybridRNNTCTCBPEModel if pieces else models.EncDecHybridRNNTCTCModel


def set_skipping(key: str, skip, loaders) -> None:
    """Set ``skip_bad_audio`` of a data section for NeMo's models; ValueError if its data cannot skip."""
    for loader in [] if skip is None else loaders if isinstance(loaders, list) else [loaders]:
        try:
            set_skip_bad_audio(loader.dataset, skip)
        except ValueError as error:
            raise ValueError(f"{key}.{error}; with use_lhotse: true it can") from error


def count_left_out(section: DictConfig) -> None:
    """Count what NeMo's own readers of manifests leave out: for its duration, or as no tar file has it."""
    tars = [tar for path in paths_in(section.get('tarred_audio_filepaths')) for tar in expanded(path)]
    found = set().union(*map(files_in, tars)) if tars and not any(map(is_remote, tars)) else None
    lines, limits = local_entries(section.get('manifest_filepath')), map(section.get, ('min_duration', 'max_duration'))
    for line in entries_within(lines, *limits):
        if found is not None and file_id(str(line.audio)).partition('-sub')[0] not in found:
            LEFT_OUT.add(NO_MEMBER, f"{line.place}: {line.audio}")


@hydra_runner(config_path="../conf/ssl/finetune", config_name="streaming_ctc")
def main(cfg: DictConfig) -> None:
    """Fine-tune by the config."""
    fit_or_exit(__file__, PATCHES_IN_USE, cfg, prepare, build)


if __name__ == "__main__":
    main()  # Hydra supplies the config
