# SPDX-License-Identifier: Apache-2.0
"""Check a pre-training config before any work is done, so that a mistake ends in one clear error. New in this project."""

import dataclasses
import inspect
from collections.abc import Iterable

import lightning.pytorch as pl
from omegaconf import DictConfig, ListConfig, OmegaConf

from nemo.collections.asr.data.data_checks import check_data
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.context_sampler import FIELD as SAMPLER
from nemo.collections.asr.parts.att_context.context_sampler import ContextSampler
from nemo.collections.asr.parts.objectives.combination import check_objective
from nemo.collections.asr.parts.utils.config_keys import (
    SECTIONS,
    Data,
    Model,
    Resumable,
    SyncedContexts,
    check_known,
    check_spelling,
    nearest_key,
)
from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig
from nemo.utils.model_utils import import_class_by_path

MODEL_SECTIONS = ('train_ds', 'preprocessor', 'masking', 'quantizer', 'encoder', 'decoder', 'loss')
OPTIONAL_SECTIONS = ('validation_ds', 'test_ds', 'spec_augment', 'optim', 'next_token', 'validation_masks', 'probe')
DATA_SECTIONS = ('train_ds', 'validation_ds', 'test_ds')
MODEL_KEYS = (
    'mask_position',
    'num_classes',
    'num_books',
    'code_dim',
    'squeeze_single',
    'skip_nan_grad',
    *Model.keys(),
)
DATA_KEYS = (
    *('manifest_filepath', 'noise_manifest', 'batch_size', 'num_workers', 'min_duration', 'max_duration', 'shuffle'),
    *('synced_contexts', 'resumable', *Data.keys()),
)
TOP_LEVEL_KEYS = (
    *('name', 'seed', 'model', 'trainer', 'exp_manager', 'curriculum'),
    *('init_from_nemo_model', 'init_from_pretrained_model', 'init_from_ptl_ckpt'),
)


def check_pretraining_config(cfg: DictConfig) -> None:
    """Check a whole config: missing values, unknown keys, contexts, manifests.

    Args:
        cfg: config with a ``model`` section, as the scripts of ``examples/asr/speech_pretraining`` take it.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise ValueError(f"the config gives no value for {', '.join(sorted(missing))}")
    if not isinstance(cfg.get('model'), DictConfig):
        raise ValueError("the config has no section model")
    check_spelling('', cfg, TOP_LEVEL_KEYS, likeness=0.85)
    check_known_keys(cfg.model)
    check_own_sections(cfg)
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
    strategy = OmegaConf.select(cfg, 'trainer.strategy')
    strategy = str(strategy.get('_target_', '') if isinstance(strategy, DictConfig) else strategy).lower()
    if OmegaConf.select(cfg, 'exp_manager.ema.enable') and ('modelparallel' in strategy or 'fsdp' in strategy):
        raise ValueError(f"exp_manager.ema.enable is true with trainer.strategy {strategy}; set one of them")


def check_known_keys(model_cfg: DictConfig) -> None:
    """Check that every part with a ``_target_`` has only keys that its class takes, and no own key is misspelt.

    Raises:
        ValueError: naming the unknown key and the nearest known one.
    """
    check_spelling('model', model_cfg, [*MODEL_KEYS, *MODEL_SECTIONS, *OPTIONAL_SECTIONS], likeness=0.85)
    for name in DATA_SECTIONS:
        if isinstance(model_cfg.get(name), DictConfig):  # NeMo has many more keys here, some of them much alike
            check_spelling(f'model.{name}', model_cfg[name], DATA_KEYS, likeness=0.9)
    _check_parts('model', model_cfg)


def check_own_sections(cfg: DictConfig) -> None:
    """Check that the sections that only this project has, and those of the trainer, have only keys that are known.

    Raises:
        ValueError: naming the unknown key and the nearest known one.
    """
    for name, known in _own_sections().items():
        section = OmegaConf.select(cfg, name)
        if isinstance(section, DictConfig):
            check_known(name, section, known)


def _own_sections() -> dict[str, Iterable[str]]:
    """Return the full names of these sections, and the keys that each may have."""
    own = {
        **{section.name: section.keys() for section in SECTIONS if section.closed},
        'trainer': _constructor_arguments(pl.Trainer),
        'exp_manager': _field_names(ExpManagerConfig),
        'exp_manager.checkpoint_callback_params': _field_names(CallbackParams),
    }
    for section in (SyncedContexts, Resumable):
        for data in DATA_SECTIONS:
            own[section.name.replace('train_ds', data)] = section.keys()
    return own


def _field_names(cls) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _check_parts(name: str, section: DictConfig) -> None:
    if '_target_' in section:
        _check_arguments(name, section)
    for key, value in section.items():
        if isinstance(value, DictConfig):
            _check_parts(f'{name}.{key}', value)


def _check_arguments(name: str, section: DictConfig) -> None:
    try:
        target = import_class_by_path(section._target_)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}._target_ is {section._target_!r}, which cannot be imported: {error}") from error
    taken = _constructor_arguments(target)
    for key in section:
        if taken is not None and not key.startswith('_') and key not in taken:
            nearest = nearest_key(key, taken, likeness=0.6)
            hint = f"did you mean {nearest}?" if nearest else f"it takes {', '.join(sorted(taken))}"
            raise ValueError(f"{name}.{key} is not an argument of {target.__name__}; {hint}")


def _constructor_arguments(target) -> set[str] | None:
    """Names that a class's constructor takes, through its parents where it passes ``**kwargs`` on; None for any."""
    names = set()
    for cls in inspect.getmro(target) if inspect.isclass(target) else [target]:
        own = cls.__dict__.get('__init__') if inspect.isclass(cls) else cls
        if own is None:
            continue
        parameters = inspect.signature(own).parameters.values()
        names |= {
            parameter.name for parameter in parameters if parameter.kind.name not in ('VAR_KEYWORD', 'VAR_POSITIONAL')
        }
        if not any(parameter.kind.name == 'VAR_KEYWORD' for parameter in parameters):
            return names - {'self'}
    return None


def check_contexts(encoder_cfg: DictConfig) -> None:
    """Check the attention contexts and their probabilities, and what draws them.

    Raises:
        ValueError: naming the entry and its value.
    """
    _check_sampler(encoder_cfg)
    sizes = encoder_cfg.get('att_context_size')
    if sizes is None or encoder_cfg.get('att_context_style') == 'chunked_limited_with_rc':
        return
    several = isinstance(sizes, ListConfig) and len(sizes) > 0 and isinstance(sizes[0], ListConfig)
    entries = sizes if several else [sizes]
    for index, entry in enumerate(entries):
        _check_entry(entry, 'model.encoder.att_context_size' + (f'[{index}]' if several else ''))
    probabilities = encoder_cfg.get('att_context_probs')
    if probabilities is None:
        return
    name = f'model.encoder.att_context_probs is {list(probabilities)}'
    if len(probabilities) != len(entries):
        raise ValueError(f"{name}; it needs one probability for each of the {len(entries)} contexts")
    numbers = all(isinstance(probability, (int, float)) for probability in probabilities)
    if not numbers or min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6:
        raise ValueError(f"{name}; probabilities are 0 or more and sum to 1")


def _check_sampler(encoder_cfg: DictConfig) -> None:
    sampler = encoder_cfg.get('att_context_sampler')
    if sampler is None:
        return
    ContextSampler.parse(sampler, encoder_cfg.get('att_context_style', 'regular'))
    probabilities = encoder_cfg.get('att_context_probs')
    if probabilities is not None:
        raise ValueError(
            f"model.encoder.att_context_probs is {list(probabilities)}, but {SAMPLER} draws the contexts of training "
            "and those of att_context_size are for validation and inference; leave one of the two null"
        )


def _check_entry(entry, field: str) -> None:
    AttContext.parse(entry, field=field)
    if not isinstance(entry, ListConfig):
        raise ValueError(f"{field} is {entry!r}; NeMo's encoder takes a pair [left, right], or several pairs")


def check_mask_position(model_cfg: DictConfig) -> None:
    """Check that targets made after the subsampling are not combined, nor predicted from another frame than their own.

    Raises:
        ValueError: naming the key, its value and what it must be.
    """
    if model_cfg.get('mask_position', 'pre_conv') != 'post_conv':
        return
    for key, needed, default in (('quantizer.combine_time_steps', 1, 1), ('loss.decoder_offset', 0, 0)):
        value = OmegaConf.select(model_cfg, key, default=default)
        if value != needed:
            raise ValueError(
                f"model.{key} is {value} with mask_position post_conv; it must be {needed}, for a target is then made "
                "of one encoder frame, its own"
            )
