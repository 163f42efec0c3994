# SPDX-License-Identifier: Apache-2.0
"""Which encoders can stream, and a copy of their weights that sessions with the same weights share."""

import hashlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.windows import STYLES
from nemo.collections.asr.parts.streaming.layers import PreparedLayer, enabled_adapters
from nemo.collections.asr.parts.streaming.linear import PreparedLinear
from nemo.collections.asr.parts.streaming.subsampling import IncrementalSubsampling
from nemo.collections.asr.parts.submodules import conformer_modules, multi_head_attention
from nemo.collections.asr.parts.submodules.batchnorm import FusedBatchNorm1d
from nemo.collections.asr.parts.submodules.causal_convs import CausalConv1D, CausalConv2D
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling
from nemo.collections.asr.parts.utils.activations import Swish
from nemo.collections.common.parts.adapter_modules import LinearAdapter
from nemo.core.classes.mixins.adapter_mixin_strategies import ResidualAddAdapterStrategy

PLAIN = (bool, int, float, str, tuple)
SAMPLED = 31  # elements of each tensor that are compared
_LOCK = threading.RLock()
_PREPARED: 'weakref.WeakKeyDictionary[nn.Module, dict[str, PreparedEncoder]]' = weakref.WeakKeyDictionary()
COMPUTED = (  # the modules whose computation is repeated here
    *(nn.LayerNorm, nn.BatchNorm1d, nn.Linear, nn.Dropout, nn.Conv1d, nn.Conv2d, nn.ModuleList, FusedBatchNorm1d),
    *(ConformerEncoder, conformer_modules.ConformerLayer, conformer_modules.ConformerFeedForward, ConvSubsampling),
    *(conformer_modules.ConformerConvolution, CausalConv1D, CausalConv2D, Swish),
    *(multi_head_attention.RelPositionalEncoding, multi_head_attention.RelPositionMultiHeadAttention),
)
METHODS = {name: [getattr(each, name, None) for each in COMPUTED] for name in ('forward', 'forward_internal')}
ADDED = ResidualAddAdapterStrategy.forward


def check_encoder_can_stream(encoder: Any, context: AttContext) -> None:
    """Raise ValueError, with the reason, if live streams do not compute an encoder's output in a context."""
    if reason := next(reasons_against(encoder, context), None):
        raise ValueError(f"{type(encoder).__name__} cannot be streamed: {reason}")
    encoder.check_att_context_size(context)


def reasons_against(encoder: Any, context: AttContext) -> Iterator[str]:
    """Yield the reasons why live streams do not compute an encoder's output in a context."""
    if not isinstance(encoder, ConformerEncoder):
        yield 'the encoder must be a ConformerEncoder'
    for key, (value, *allowed) in _settings_with_allowed(encoder).items():
        if value not in allowed:
            yield f'encoder.{key} is {value}; it must be {" or ".join(map(str, allowed))}'
    for index, effective in enumerate(encoder.effective_att_contexts(context)):
        if effective.right == UNLIMITED:
            yield f'the right context of layer {index} is unlimited, so that the first frame waits for the last'
    for place, module in _computed_parts(encoder):
        for method, known in METHODS.items():
            if method in vars(module) or getattr(type(module), method, None) not in known:
                yield f'{place} is a {type(module).__name__} with a {method} that streams do not compute'
    for name, module in encoder.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            yield f'encoder.{name}'.rstrip('.') + ' has forward hooks'
    for index, adapter in ((at, each) for at, layer in enumerate(encoder.layers) for each in enabled_adapters(layer)):
        if type(adapter).forward is not LinearAdapter.forward or type(adapter.adapter_strategy).forward is not ADDED:
            yield f'encoder.layers.{index} has a {type(adapter).__name__}; only added linear adapters are computed'


def _subsampling_of(encoder: Any) -> Any:
    return getattr(encoder.pre_encode, 'pre_encode', encoder.pre_encode)  # masking after the convolutions wraps it


def _settings_with_allowed(encoder: Any) -> dict[str, tuple[Any, ...]]:
    """Return settings of an encoder's configuration, each with the values of which streams need one."""
    subsampling, convolution = _subsampling_of(encoder), encoder.conv_context_size
    return {
        'self_attention_model': (encoder.self_attention_model, 'rel_pos'),
        'att_context_style': (encoder.att_context_style, *STYLES),
        'conv_context_size': (convolution if convolution[1] else 'causal', 'causal'),
        'conv_context_style': (getattr(encoder, 'conv_context_style', 'regular'), 'regular'),
        # those that, in eval mode, take each frame by itself
        'conv_norm_type': (encoder.layers[0].conv.norm_type, 'layer_norm', 'batch_norm', 'fused_batch_norm'),
        'reduction_position': (encoder.reduction_position, None),
        'subsampling': (getattr(subsampling, '_subsampling', type(subsampling).__name__), 'dw_striding', 'striding'),
        'causal_downsampling': (getattr(subsampling, 'is_causal', False), True),
        'subsampling_conv_chunking_factor': (getattr(subsampling, 'subsampling_conv_chunking_factor', 1), 1),
    }


def _computed_parts(encoder: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, module in _subsampling_of(encoder).named_modules():
        if not name or module._parameters:
            yield f'encoder.pre_encode.{name}'.rstrip('.'), module
    for name, module in encoder.named_modules():
        if not name.startswith('pre_encode') and '.adapter_layer' not in name:
            yield f'encoder.{name}'.rstrip('.'), module


class PreparedEncoder:
    """A copy of the weights of a ``ConformerEncoder``, arranged for live streams; :meth:`of` makes it.

    ``digest`` identifies the weights in the state of a stream, by their shapes and sampled elements.
    """

    def __init__(self, encoder: Any, precision: str):
        self._facts, self._tensors = _facts_of(encoder)  # kept, so that no other tensor gets their place
        self.digest = self._facts[-1]
        with torch.inference_mode(False), torch.no_grad():
            self.subsampling = IncrementalSubsampling(_subsampling_of(encoder), precision)
            self.layers = [PreparedLayer(layer, precision) for layer in encoder.layers]
            out, scale = encoder.out_proj, encoder.pos_enc.xscale
            self.out = None if out is None else PreparedLinear(out.weight, out.bias)
            self.scale = 1.0 if scale is None else float(scale)

    @classmethod
    def of(cls, encoder: Any, precision: str = 'float32') -> 'PreparedEncoder':
        """Return the present weights of an encoder that can stream, prepared again if they changed."""
        with _LOCK:
            prepared = _PREPARED.setdefault(encoder, {})
            if precision not in prepared or prepared[precision]._facts != _facts_of(encoder)[0]:
                prepared[precision] = cls(encoder, precision)
            return prepared[precision]


def _facts_of(encoder: Any) -> tuple[list[Any], list[torch.Tensor]]:
    """Return what changes with modules and weights, with a digest of samples at last, and the tensors."""
    parts = _subsampling_of(encoder), encoder.layers, encoder.out_proj
    modules = [module for part in parts if part is not None for module in part.modules()]
    owned = [each for module in modules for each in (*module._parameters.values(), *module._buffers.values())]
    tensors = [each for each in owned if each is not None]
    facts: list[Any] = [(type(module), getattr(module, 'get_enabled_adapters', list)()) for module in modules]
    facts += [[value for value in vars(module).values() if isinstance(value, PLAIN)] for module in modules]
    facts += [(None if each.is_inference() else each._version, each.data_ptr(), each.dtype) for each in tensors]
    with torch.inference_mode(False), torch.no_grad():
        samples = torch.cat([each.flatten()[:: max(each.numel() // SAMPLED, 1)].float() for each in tensors])
    shapes = str([list(each.shape) for each in tensors]).encode()
    return [*facts, hashlib.sha256(shapes + samples.cpu().numpy().tobytes()).hexdigest()[:16]], tensors
