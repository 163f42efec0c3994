# SPDX-License-Identifier: Apache-2.0
"""Turn an offline NEST model into a streaming one: config, weights, and a check. New in this project."""

import copy

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo.collections.asr.models import ssl_models
from nemo.collections.asr.parts.streaming.evaluation import measure_stream, streamable_contexts

CONVERTIBLE = {  # keys, and what may be their values, or their last parts; null always
    'target': ('EncDecDenoiseMaskedTokenPredModel', 'EncDecMaskedTokenPredModel'),
    'preprocessor._target_': ('AudioToMelSpectrogramPreprocessor',),
    'encoder._target_': ('ConformerEncoder',),
    'encoder.self_attention_model': ('rel_pos',),
    'encoder.subsampling': ('dw_striding', 'striding'),
    'encoder.reduction': ('null',),
    'encoder.global_tokens': ('0',),
    'mask_position': ('pre_conv',),  # else the targets are made of what causal convolutions change
}
DATA_SECTIONS = ('train_ds', 'validation_ds', 'test_ds')
SUBSAMPLED = 'encoder.pre_encode.out.weight'
LARGEST_DIFFERENCE = 1e-4  # of streamed and offline outputs
KEPT = 'kept as it is'  # of weights


def check_convertible(cfg: DictConfig) -> None:
    """Raise ValueError for the config of a ``.nemo`` file that cannot become a streaming model."""
    for key, allowed in CONVERTIBLE.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and str(value).rpartition('.')[2] not in allowed:
            raise ValueError(f"model.{key} is {value!r}; to be converted, it must be {' or '.join(allowed)}")
    causal = cfg.encoder.get('conv_context_size') == 'causal' and cfg.encoder.get('causal_downsampling', False)
    if causal and cfg.encoder.get('conv_norm_type') == 'layer_norm':
        raise ValueError("it streams already; set its contexts in the config or with set_att_context_size")


def streaming_config(cfg: DictConfig, contexts, style: str, statistics) -> DictConfig:
    """Return the config of the streaming model, from that of the offline one.

    ``contexts`` are a pair [left, right] in attention frames, or several; ``statistics`` the ``fixed_mean`` and
    ``fixed_std`` of the features, or None.
    """
    cfg = copy.deepcopy(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.encoder.update(causal_downsampling=True, conv_context_size='causal', conv_norm_type='layer_norm')
    cfg.encoder.update(att_context_size=contexts, att_context_style=style, att_context_probs=None)
    cfg.encoder.pop('att_context_sampler', None)
    cfg.preprocessor.normalize = 'NA' if statistics is None else statistics
    cfg.target_normalize = 'per_feature'
    cfg.masking.causal = True
    cfg.loss.decoder_offset = 1
    return cfg


def build(cfg: DictConfig):
    """Build the streaming model without its data; raises ValueError if the encoder refuses its contexts."""
    without_data = copy.deepcopy(cfg)
    data = {section: without_data.pop(section) for section in DATA_SECTIONS if section in cfg}
    model = getattr(ssl_models, str(cfg.target).rpartition('.')[2])(without_data)
    with open_dict(model.cfg):
        model.cfg.update(data)
    return model.eval()


@torch.no_grad()
def convert_weights(offline, streaming) -> dict[str, str]:
    """Copy every weight of the offline model that fits into the one of :func:`streaming_config`.

    The affine part of batch_norm becomes that of layer_norm: both scale and shift a channel that has been
    standardised. The projection after subsampling gets a column of zeros, see :func:`shifted_by_a_bin`.

    Returns:
        what became of each weight, by name; ``KEPT`` of those that were copied unchanged.
    """
    old, new = offline.state_dict(), streaming.state_dict()
    results = dict.fromkeys(new, 'new: the offline model has none')
    for name, weight in old.items():
        if name not in new:
            results[name] = 'left out: the streaming model has none'
        elif weight.shape == new[name].shape:
            new[name].copy_(weight)
            results[name] = KEPT
        elif name == SUBSAMPLED and (moved := shifted_by_a_bin(weight, new[name].shape, offline)) is not None:
            new[name].copy_(moved)
            results[name] = 'moved: the first of the frequency bins that causal subsampling adds begins with zeros'
        else:
            results[name] = f'new: its shape is {list(new[name].shape)}, not {list(weight.shape)}'
    streaming.load_state_dict(new)
    return results


def shifted_by_a_bin(weight: torch.Tensor, shape: torch.Size, model):
    """Fit the projection after subsampling to causal subsampling, None if that is not what widened it.

    Causal subsampling pads before the first feature and by one more in all, which adds a frequency bin. Over the layers
    its bin i sees what bin i - 1 saw, within a feature: the weights [d_model, channels * bins] move up by one.
    """
    channels = model.encoder.pre_encode._conv_channels
    if shape[0] != weight.shape[0] or shape[1] != weight.shape[1] + channels:
        return None
    bins = weight.reshape(weight.shape[0], channels, -1)
    return torch.nn.functional.pad(bins, (1, 0)).reshape(shape)


def check_streams(model, seconds: float = 2.0) -> float:
    """Stream noise in each context; return the largest difference from offline; ValueError if it fails."""
    length, differences = int(seconds * model.preprocessor.featurizer.sample_rate), []
    samples = np.random.default_rng(0).standard_normal(length, dtype=np.float32)
    # Where none streams, the session raises with the reason.
    for context in streamable_contexts(model) or model.encoder.att_context_size_all:
        differences.append(measure_stream(model, samples, context, step_seconds=0.077).largest_difference)
    largest = float(np.max(differences))  # NaN if one is
    if not largest <= LARGEST_DIFFERENCE:
        raise ValueError(f"streamed and offline outputs differ by {largest:.1e}, more than {LARGEST_DIFFERENCE:.0e}")
    return largest
