# SPDX-License-Identifier: Apache-2.0
"""Turn an offline NEST model into a streaming one: config, weights, and a check. New in this project."""

import copy
from dataclasses import dataclass, field

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo.collections.asr.models import ssl_models
from nemo.collections.asr.parts.streaming.evaluation import encode_offline, streamable_contexts
from nemo.collections.asr.parts.streaming.session import StreamingSession

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


@dataclass
class ConvertedWeights:
    """How each weight was converted, by name."""

    as_they_are: list = field(default_factory=list)
    moved: dict = field(default_factory=dict)  # those that a wider layer took, and how
    dropped: dict = field(default_factory=dict)  # those that no part of the streaming model takes, and why
    fresh: dict = field(default_factory=dict)  # those of the streaming model that start from random weights, and why

    def __str__(self) -> str:
        lines = [f'{len(self.as_they_are)} weights kept as they are']
        for title, weights in (('moved', self.moved), ('left out', self.dropped), ('new', self.fresh)):
            lines += [f'{title}: {name}: {reason}' for name, reason in weights.items()]
        return '\n'.join(lines)


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
def convert_weights(offline, streaming) -> ConvertedWeights:
    """Copy every weight of the offline model that fits into the one of :func:`streaming_config`.

    The affine part of batch_norm becomes that of layer_norm: both scale and shift a channel that has been
    standardised. The projection after subsampling gets a column of zeros, see :func:`shifted_by_a_bin`.
    """
    old, new, result = offline.state_dict(), streaming.state_dict(), ConvertedWeights()
    for name, weight in old.items():
        if name not in new:
            is_statistic = '.conv.batch_norm.' in name
            result.dropped[name] = 'a running statistic of batch_norm' if is_statistic else 'the new model has none'
        elif weight.shape == new[name].shape:
            new[name].copy_(weight)
            result.as_they_are.append(name)
        elif name == SUBSAMPLED and (moved := shifted_by_a_bin(weight, new[name].shape, offline)) is not None:
            new[name].copy_(moved)
            result.moved[name] = 'the first of the frequency bins that causal subsampling adds begins with zeros'
        else:
            result.dropped[name] = f'its shape is {list(weight.shape)}'
            result.fresh[name] = f'its shape is {list(new[name].shape)}'
    result.fresh.update({name: 'the offline model has none' for name in new if name not in old})
    streaming.load_state_dict(new)
    return result


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


@torch.no_grad()
def check_streams(model, seconds: float = 2.0) -> float:
    """Stream noise in each context; return the largest difference from offline; ValueError if it fails."""
    length = int(seconds * model.preprocessor.featurizer.sample_rate)
    samples, largest = torch.randn(1, length, generator=torch.Generator().manual_seed(0)), 0.0
    # Where none streams, the session raises with the reason.
    for context in streamable_contexts(model) or model.encoder.att_context_size_all:
        session = StreamingSession(model, att_context_size=context)
        pieces = [session.step(piece).encoded for piece in samples.split(1234, dim=1)] + [session.finish().encoded]
        difference = torch.cat(pieces, dim=2) - encode_offline(model, samples, context)
        largest = max(largest, difference.abs().max().item())
    if not largest <= LARGEST_DIFFERENCE:
        raise ValueError(f"streamed and offline outputs differ by {largest:.1e}, more than {LARGEST_DIFFERENCE:.0e}")
    return largest
