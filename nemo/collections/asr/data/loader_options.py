# SPDX-License-Identifier: Apache-2.0
"""Options of a data section that NeMo's loaders lack, applied to the loader that NeMo makes."""

import copy
from contextlib import nullcontext

from omegaconf import OmegaConf, open_dict
from torch.utils.data import DataLoader

from nemo.collections.asr.data.resumable_loader import make_resumable
from nemo.collections.asr.data.ssl_dataset import set_skip_bad_audio
from nemo.collections.asr.parts.att_context.synced_collate import create_synced_context_collate
from nemo.collections.asr.parts.utils.config_keys import SyncedContexts

LOADER_KEYS = ('synced_contexts', 'skip_bad_audio', 'resumable')  # which NeMo's data loaders lack


def take_own_options(config) -> tuple:
    """Split a data section.

    Args:
        config: a mapping, or None.

    Returns:
        the section as NeMo's loaders take it, a copy where there was something to leave out; and a dict of the
        options that :func:`with_own_options` applies.
    """
    own = {key: config[key] for key in LOADER_KEYS if config is not None and config.get(key) is not None}
    if not own:
        return config, own
    config = copy.deepcopy(config)
    with open_dict(config) if OmegaConf.is_config(config) else nullcontext():
        for key in own:
            del config[key]
    return config, own


def with_own_options(loader, synced_contexts=None, skip_bad_audio=None, resumable=None):
    """Apply the options of the config to a data loader; None leaves it as it is.

    Args:
        loader: a data loader, or None.
        synced_contexts: the arguments of ``create_synced_context_collate`` but the first.
        skip_bad_audio: see ``set_skip_bad_audio``.
        resumable: see ``make_resumable``.

    Raises:
        ValueError: naming the option, if the loader cannot do it.
    """
    if loader is None:
        return None
    if skip_bad_audio is not None:
        set_skip_bad_audio(loader.dataset, skip_bad_audio)
    if resumable is not None:
        loader = make_resumable(loader, resumable)
    if synced_contexts is not None:
        _sync_contexts(loader, synced_contexts)
    return loader


def _sync_contexts(loader, options) -> None:
    """Let a data loader's batches carry contexts; lhotse's, too, passes its ready batches through ``collate_fn``."""
    SyncedContexts.parse(options, 'synced_contexts')
    if not isinstance(loader, DataLoader):
        raise ValueError(f"synced_contexts needs a torch data loader; {type(loader).__name__} collates nothing")
    loader.collate_fn = create_synced_context_collate(loader.collate_fn, **options)
