# SPDX-License-Identifier: Apache-2.0
"""Check a config before training, so that a mistake ends in one clear error. New in this project."""

import inspect
import re
from collections.abc import Collection

import lightning.pytorch as pl
from omegaconf import DictConfig, ListConfig, OmegaConf

from nemo.collections.asr.data.data_checks import check_data
from nemo.collections.asr.parts.att_context.context import AttContext, is_distribution
from nemo.collections.asr.parts.att_context.policy import SAMPLER, ContextSampler
from nemo.collections.asr.parts.objectives.combination import check_objective
from nemo.collections.asr.parts.utils.config_keys import SECTIONS, Data, Model, check_known
from nemo.core.connectors.initial_weights import PLACES
from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig
from nemo.utils.model_utils import import_class_by_path

MODEL_SECTIONS = ('train_ds', 'preprocessor', 'masking', 'quantizer', 'encoder', 'decoder', 'loss')
DATA_SECTIONS = ('train_ds', 'validation_ds', 'test_ds')
MODEL_KEYS = (
    *MODEL_SECTIONS,
    *('validation_ds', 'test_ds', 'spec_augment', 'optim', 'next_token', 'validation_masks', 'probe'),
    *('mask_position', 'num_classes', 'num_books', 'code_dim', 'squeeze_single', 'skip_nan_grad', *Model.keys()),
)
DATA_KEYS = (
    *('manifest_filepath', 'noise_manifest', 'batch_size', 'num_workers', 'min_duration', 'max_duration', 'shuffle'),
    *('synced_contexts', 'resumable', *Data.keys()),
)
Keys = tuple[Collection[str] | None, float | None]
"""Of a section: the known ones, None for any; and if others may stand beside them, how much like one of them is too much."""
KNOWN: dict[str, Keys] = {
    '': (('name', 'seed', 'model', 'trainer', 'exp_manager', 'curriculum', *PLACES), 0.85),
    'model': (MODEL_KEYS, 0.85),
    'model.train_ds': (DATA_KEYS, 0.9),  # NeMo has many more here, some of them much alike
    **{section.name: (section.keys(), None) for section in SECTIONS if section.closed},
}
TAKEN_BY = {
    'trainer': pl.Trainer,
    'exp_manager': ExpManagerConfig,
    'exp_manager.checkpoint_callback_params': CallbackParams,
}


def check_pretraining_config(cfg: DictConfig) -> None:
    """Check a config with a ``model`` section; ValueError names key, value and what is allowed."""
    if missing := OmegaConf.missing_keys(cfg):
        raise ValueError(f"the config gives no value for {', '.join(sorted(missing))}")
    if not isinstance(cfg.get('model'), DictConfig):
        raise ValueError("the config has no section model")
    check_known_keys(cfg)
    for section in MODEL_SECTIONS:
        if not isinstance(cfg.model.get(section), DictConfig):
            raise ValueError(f"the config has no section model.{section}")
    check_contexts(cfg.model.encoder)
    check_mask_position(cfg.model)
    check_objective(cfg.model)
    check_averaging(cfg)
    check_data('model.train_ds', cfg.model.train_ds)
    if cfg.model.get('validation_ds'):
        check_data('model.validation_ds', cfg.model.validation_ds)


def check_averaging(cfg: DictConfig) -> None:
    """Refuse averaged weights with sharded ones: NeMo's callback keeps whole tensors."""
    strategy = str(OmegaConf.select(cfg, 'trainer.strategy'))
    is_sharded = any(name in strategy.lower() for name in ('modelparallel', 'fsdp', 'fully_shard'))
    if is_sharded and OmegaConf.select(cfg, 'exp_manager.ema.enable'):
        raise ValueError(f"exp_manager.ema.enable is true with trainer.strategy {strategy}; set one of them")


def check_known_keys(section: DictConfig, name: str = '') -> None:
    """Check that no key is misspelt; ValueError naming the unknown key and the nearest known one.

    Sections of this project, of the trainer, of NeMo's experiment manager and of a model's parts with a ``_target_`` have no
    others.
    """
    known, likeness = _known_keys(section, name)
    if known is not None:
        check_known(name, [key for key in map(str, section) if not key.startswith('_')], known, likeness)
    for key in map(str, section):
        if isinstance(section.get(key), DictConfig):
            check_known_keys(section[key], f'{name}.{key}' if name else key)


def _known_keys(section: DictConfig, name: str) -> Keys:
    if '_target_' in section and name.startswith('model.'):  # strategies and profilers pass others on
        try:
            return _constructor_arguments(import_class_by_path(section._target_)), None
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{name}._target_ is {section._target_!r}, which cannot be imported: {error}") from error
    known = KNOWN.get(re.sub('(validation|test)_ds', 'train_ds', name))
    return known or (_constructor_arguments(TAKEN_BY.get(name)), None)


def _constructor_arguments(target) -> set[str] | None:
    """Return what a class's constructor takes, parents of ``**kwargs`` included; None for anything."""
    names: set[str] = set()
    for cls in getattr(target, '__mro__', ()):
        if '__init__' in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters.values()
            names |= {each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
            if all(each.kind != each.VAR_KEYWORD for each in parameters):
                return names - {'self'}
    return None


def check_contexts(encoder_cfg: DictConfig) -> None:
    """Check contexts, probabilities and samplers; ValueError with key, value and what is allowed."""
    sampler, sizes = encoder_cfg.get('att_context_sampler'), encoder_cfg.get('att_context_size')
    probabilities, style = encoder_cfg.get('att_context_probs'), encoder_cfg.get('att_context_style', 'regular')
    probs = f'model.encoder.att_context_probs is {probabilities}'
    if sampler is not None:
        ContextSampler.parse(sampler, style)
        if probabilities is not None:
            raise ValueError(f"{probs}, but {SAMPLER} draws the contexts of training; leave one of the two null")
    if sizes is None or style == 'chunked_limited_with_rc':
        return
    several = isinstance(sizes, ListConfig) and len(sizes) > 0 and isinstance(sizes[0], ListConfig)
    entries = sizes if several else [sizes]
    for index, entry in enumerate(entries):
        field = 'model.encoder.att_context_size' + (f'[{index}]' if several else '')
        AttContext.parse(entry, field=field)
        if not isinstance(entry, ListConfig):
            raise ValueError(f"{field} is {entry!r}; NeMo's encoder takes a pair [left, right], or several pairs")
    if probabilities is not None and not is_distribution(probabilities, len(entries)):
        raise ValueError(
            f"{probs}; it must be {len(entries)} numbers from 0 to 1, one for each context, with the sum 1"
        )


def check_mask_position(model_cfg: DictConfig) -> None:
    """Refuse targets after the subsampling that are combined, or predicted from another frame."""
    if model_cfg.get('mask_position', 'pre_conv') != 'post_conv':
        return
    for key, needed in (('quantizer.combine_time_steps', 1), ('loss.decoder_offset', 0)):
        value = OmegaConf.select(model_cfg, key, default=needed)
        if value != needed:
            raise ValueError(
                f"model.{key} is {value} with mask_position post_conv; it must be {needed}, for a target is then made "
                "of one encoder frame, its own"
            )
