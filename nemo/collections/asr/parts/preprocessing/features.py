# SPDX-License-Identifier: Apache-2.0
"""Feature normalisation that can stream, and normalisation of the targets' features.

Fixed corpus statistics, ``preprocessor.normalize: {fixed_mean: [...], fixed_std: [...]}``, hold from a stream's first
frame on. The statistics of ``standardize_per_feature`` are the utterance's: for targets, which exist only in training.

Shapes: B utterances, D features, T feature frames.
"""

import functools
import math
from collections.abc import Mapping

import numpy as np
import torch
from omegaconf import OmegaConf

from nemo.collections.asr.parts.utils.nonfinite_guard import fault_of
from nemo.utils import logging
from nemo_streaming_ssl import upstream

_up = upstream(globals())

_STATISTICS = ("fixed_mean", "fixed_std")
# A reload, as of notebooks, finds this project's function there.
_stock_normalize_batch = getattr(_up.normalize_batch, '__wrapped__', _up.normalize_batch)


def normalize_batch(x, seq_len, normalize_type):
    """Normalise features [B, D, T] of any floating dtype; arguments and results are NeMo's.

    A mapping with ``fixed_mean`` and ``fixed_std``, D numbers each, works for any batch size, and does not use ``seq_len``;
    ValueError if it does not fit.
    """
    if not isinstance(normalize_type, Mapping):
        return _stock_normalize_batch(x, seq_len, normalize_type)
    statistics = check_fixed_statistics(normalize_type, features=x.shape[1])
    # low precision would round a mean of -12 by up to 0.03, so the sums are at least float32
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, std = _statistics_tensors(*statistics.values(), dtype=dtype, device=x.device)
    return ((x.to(dtype) - mean[:, None]) / std[:, None]).to(x.dtype), mean, std


normalize_batch.__wrapped__ = _stock_normalize_batch


@functools.lru_cache(maxsize=32)
def _statistics_tensors(mean, std, dtype, device):
    """Return the two tuples as [D] tensors, copied once per device, since a copy synchronises a GPU."""
    with torch.inference_mode(False):  # a tensor made under inference mode could not be used in training later
        return torch.tensor(mean, dtype=dtype, device=device), torch.tensor(std, dtype=dtype, device=device)


def check_fixed_statistics(statistics, features=None, name="preprocessor.normalize"):
    """Return ``{"fixed_mean": (float, ...), "fixed_std": (float, ...)}`` of a mapping that has these keys.

    Raises:
        ValueError: unless each has ``features`` finite numbers (None: as many as the other), and deviations are above 0.
    """
    missing = [key for key in _STATISTICS if key not in statistics]
    if missing:
        raise ValueError(f"{name} has no {' and no '.join(missing)}; it needs both fixed_mean and fixed_std")
    checked = {key: _as_floats(statistics[key], f"{name}.{key}") for key in _STATISTICS}
    expected = features or max(len(checked["fixed_mean"]), 1)
    for key, values in checked.items():
        if len(values) != expected:
            raise ValueError(f"{name}.{key} has {len(values)} numbers; it needs {expected}, one per feature")
        lowest, rule = (0.0, "finite and above 0") if key == "fixed_std" else (-math.inf, "finite")
        for index, value in enumerate(values):
            if not (math.isfinite(value) and value > lowest):
                raise ValueError(f"{name}.{key}[{index}] is {value}; every value must be {rule}")
    return checked


def _as_floats(values, name):
    """Return the numbers of a list, tuple, array, tensor or ListConfig as a tuple of floats."""
    try:
        return tuple(np.asarray(values, dtype=float).ravel().tolist())  # NeMo took [1, D], too
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {values!r}; it needs a list of numbers, one per feature") from None


def load_fixed_statistics(path):
    """Read a ``normalize`` file of ``compute_feature_stats.py``; ValueError if it does not fit."""
    try:
        content = dict(OmegaConf.load(path))
    except Exception as error:  # yaml, OmegaConf and decoding each have errors of their own
        raise ValueError(f"feature statistics {path} cannot be read: {error}") from error
    statistics = check_fixed_statistics(content, name=f"feature statistics {path}:")
    return {key: list(values) for key, values in statistics.items()}


def standardize_per_feature(features, lengths):
    """Give every feature of every utterance zero mean and unit variance over the valid frames.

    As NeMo's ``per_feature`` normalisation, but without its host-device synchronisation, at least in float32, and
    finite for utterances of one frame or none. Takes features [B, D, T] of any floating dtype, and the valid frames
    per utterance [B]; returns the same shape and dtype, 0 at and beyond each length.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    valid = torch.arange(features.shape[-1], device=features.device) < lengths.to(features.device)[:, None]
    valid, lengths = valid[:, None], valid.sum(dim=1).view(-1, 1, 1)
    mean = torch.where(valid, wide, 0.0).sum(dim=2, keepdim=True) / lengths.clamp(min=1)
    centred = torch.where(valid, wide - mean, 0.0)
    # one frame has no variance: stock's 0 / 0, which it replaces by 0 too
    std = (centred.square().sum(dim=2, keepdim=True) / (lengths - 1).clamp(min=1)).sqrt()
    return (centred / (std + 1e-5)).to(features.dtype)  # as in NeMo, so that constant features stay finite


class FilterbankFeatures(_up.FilterbankFeatures):
    """NeMo's mel features; ValueError at construction if fixed statistics are a file or do not fit."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if isinstance(self.normalize, str) and self.normalize not in ('per_feature', 'all_features', 'NA', 'none'):
            found = f"preprocessor.normalize is {self.normalize!r}, which NeMo takes for no normalisation"
            if '.' in self.normalize:
                raise ValueError(f"{found}; pretrain.py reads a .yaml file, others need load_fixed_statistics(file)")
            logging.warning(f"{found}; its values are per_feature, all_features and NA")
        if isinstance(self.normalize, Mapping):
            self.normalize = check_fixed_statistics(self.normalize, features=self.nfilt * self.frame_splicing)


class WaveformFeaturizer(_up.WaveformFeaturizer):
    """NeMo's reader of audio files; mixes channels down, and raises an error for non-finite samples."""

    channel_selector = 'average'
    """For calls that give none: NeMo's, which keeps all channels, makes samples that no model here takes."""

    def process(self, file_path, *args, channel_selector=None, **kwargs):
        """Return the samples [N] of a file; ValueError if it lacks the channel or has non-finite samples."""
        selector = self.channel_selector if channel_selector is None else channel_selector
        try:
            samples = super().process(file_path, *args, channel_selector=selector, **kwargs)
        except Exception as error:  # of any decoder, which may not name the file
            note = getattr(error, 'add_note', logging.error)  # Python 3.10 has no notes
            note(f'audio file: {file_path}')
            raise
        if samples.dim() > 1:
            raise ValueError(
                f"{file_path}: channel_selector {selector} gives {samples.shape[1]} channels; set one or 'average'"
            )
        if fault := fault_of(samples):
            raise ValueError(f"{file_path}: {fault}")
        return samples


# NeMo's classes look these up in their own module.
_up.normalize_batch, _up.WaveformFeaturizer = normalize_batch, WaveformFeaturizer
