# SPDX-License-Identifier: Apache-2.0
"""Options of a data section that NeMo's loaders lack, applied to the loader that NeMo makes."""

import copy
from contextlib import nullcontext

from omegaconf import OmegaConf, open_dict
from torch.utils.data import DataLoader

from nemo.collections.asr.data.resumable_loader import make_resumable
from nemo.collections.asr.data.ssl_dataset import parts_of, set_skip_bad_audio
from nemo.collections.asr.parts.att_context.synced_collate import create_synced_context_collate
from nemo.collections.asr.parts.utils.config_keys import SyncedContexts

LOADER_KEYS = ('synced_contexts', 'skip_bad_audio', 'resumable')  # which NeMo's data loaders lack
AUGMENTORS = ('augmentor', 'batch_augmentor')  # NeMo's loaders fail where one is null


def take_own_options(config) -> tuple:
    """Return a data section as NeMo's loaders take it, a copy where something is left out; and the own options, a dict."""
    if config is None:
        return config, {}
    own = {key: config[key] for key in LOADER_KEYS if config.get(key) is not None}
    unfit = [*own, *(key for key in AUGMENTORS if key in config and config[key] is None)]
    if unfit:
        config = copy.deepcopy(config)
        with open_dict(config) if OmegaConf.is_config(config) else nullcontext():
            for key in unfit:
                del config[key]
    return config, own


def with_own_options(loader, synced_contexts=None, skip_bad_audio=None, resumable=None, channel_selector=None):
    """Apply the options of the config to a data loader; None leaves it as it is.

    Args:
        loader: a data loader, or None.
        synced_contexts: the arguments of ``create_synced_context_collate`` but the first.
        skip_bad_audio: see ``set_skip_bad_audio``.
        resumable: see ``make_resumable``.
        channel_selector: of the readers; NeMo's tarred datasets take none.

    Raises:
        ValueError: naming the option, if the loader cannot do it.
    """
    if loader is None:
        return None
    if skip_bad_audio is not None:
        set_skip_bad_audio(loader.dataset, skip_bad_audio)
    for part in parts_of(getattr(loader, 'dataset', None)):
        if channel_selector is not None and hasattr(part, 'featurizer'):
            part.featurizer.channel_selector = channel_selector
    if resumable is not None:
        loader = make_resumable(loader, resumable)
    if synced_contexts is not None:
        SyncedContexts.parse(synced_contexts, 'synced_contexts')
        if not isinstance(loader, DataLoader):
            raise ValueError(f"synced_contexts needs a torch data loader; {type(loader).__name__} collates nothing")
        loader.collate_fn = create_synced_context_collate(loader.collate_fn, **synced_contexts)
    return loader
