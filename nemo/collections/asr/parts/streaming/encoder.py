# SPDX-License-Identifier: Apache-2.0
"""Which encoders can stream, and what of their context a stream needs."""

from collections.abc import Iterator

from torch import nn

from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.windows import STYLES, Window
from nemo.collections.asr.parts.submodules.batchnorm import FusedBatchNorm1d
from nemo.collections.asr.parts.submodules.causal_convs import CausalConv1D, CausalConv2D
from nemo.collections.asr.parts.submodules.conformer_modules import (
    ConformerConvolution,
    ConformerFeedForward,
    ConformerLayer,
)
from nemo.collections.asr.parts.submodules.multi_head_attention import (
    RelPositionalEncoding,
    RelPositionMultiHeadAttention,
)
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling
from nemo.collections.asr.parts.utils.activations import Swish
from nemo.collections.common.parts.adapter_modules import LinearAdapter
from nemo.core.classes.mixins.adapter_mixin_strategies import ResidualAddAdapterStrategy

SUBSAMPLINGS = ('dw_striding', 'striding')
NORMS = {  # of the convolutions: those that, in eval mode, take each frame by itself
    'layer_norm': nn.LayerNorm,
    'batch_norm': nn.BatchNorm1d,
    'fused_batch_norm': FusedBatchNorm1d,
}
FEED_FORWARD = {
    '': ConformerFeedForward,
    '.linear1': nn.Linear,
    '.activation': Swish,
    '.dropout': nn.Dropout,
    '.linear2': nn.Linear,
}
LAYER = {  # the modules of a layer whose computation ``layers.py`` repeats
    '': ConformerLayer,
    **{f'.norm_{name}': nn.LayerNorm for name in ('feed_forward1', 'self_att', 'conv', 'feed_forward2', 'out')},
    **{f'.feed_forward{half}{name}': kind for half in '12' for name, kind in FEED_FORWARD.items()},
    '.self_attn': RelPositionMultiHeadAttention,
    **{f'.self_attn.linear_{name}': nn.Linear for name in ('q', 'k', 'v', 'out', 'pos')},
    '.self_attn.dropout': nn.Dropout,
    '.conv': ConformerConvolution,
    '.conv.pointwise_conv1': nn.Conv1d,
    '.conv.depthwise_conv': CausalConv1D,
    '.conv.activation': Swish,
    '.conv.pointwise_conv2': nn.Conv1d,
    '.dropout': nn.Dropout,
}


class StreamingEncoder:
    """A ``ConformerEncoder`` in one attention context, as streams need it.

    A layer with a right context in ``regular`` style waits for the frames that it needs, so look-aheads add up.

    Args:
        encoder: a ``ConformerEncoder``.
        context: the batch's context; the layers' own ones narrow it.

    Raises:
        ValueError: if the encoder needs what a stream does not have, with the reason.
    """

    def __init__(self, encoder: ConformerEncoder, context: AttContext):
        reason = why_not(encoder, context)
        if reason is not None:
            raise ValueError(f"{type(encoder).__name__} cannot be streamed: {reason}")
        encoder.check_att_context_size(context)
        self.encoder, self.context = encoder, context
        self.windows = encoder.effective_windows(context)
        self.factor, self.style = encoder.subsampling_factor, encoder.att_context_style
        chunked = self.style == 'chunked_limited'
        self.chunk = Window(context, self.style).chunk
        self.waits = [0 if chunked else window.context.right for window in self.windows]  # of each layer, in frames
        self.look_ahead = context.right if chunked else sum(self.waits)
        self.width = encoder.d_model if encoder.out_proj is None else encoder.out_proj.out_features
        weight = next(encoder.parameters())
        self.dtype, self.device = weight.dtype, weight.device

    def settings(self) -> dict:
        """Return what two encoders must have in common to share a stream, beside their weights."""
        return {
            'att_context_size': self.context.as_list(),
            'layer_contexts': [window.context.as_list() for window in self.windows],
            'att_context_style': self.style,
            'dtype': str(self.dtype).removeprefix('torch.'),
        }


def subsampling_of(encoder: ConformerEncoder) -> nn.Module:
    """Return the subsampling, which masking after the convolutions wraps."""
    return getattr(encoder.pre_encode, 'pre_encode', encoder.pre_encode)


def enabled_adapters(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the adapters of a layer that are enabled now, by name."""
    names = layer.get_enabled_adapters() if layer.is_adapter_available() else []
    return {name: layer.adapter_layer[name] for name in names}


def why_not(encoder, context: AttContext) -> str | None:
    """Return the first reason why live streams do not compute an encoder's output in a context, or None."""
    return next(_reasons(encoder, context), None)


def _reasons(encoder, context: AttContext) -> Iterator[str]:
    if not isinstance(encoder, ConformerEncoder):
        yield 'the encoder must be a ConformerEncoder'
    if encoder.self_attention_model != 'rel_pos':
        yield f'encoder.self_attention_model is {encoder.self_attention_model}; use rel_pos'
    if encoder.att_context_style not in STYLES:
        yield f'encoder.att_context_style is {encoder.att_context_style}; streams need one of {STYLES}'
    for index, effective in enumerate(encoder.effective_att_contexts(context)):
        if effective.right == UNLIMITED:
            yield f'the right context of layer {index} is unlimited, so that the first frame waits for the last'
    if encoder.conv_context_size[1] != 0 or getattr(encoder, 'conv_context_style', 'regular') != 'regular':
        yield f'encoder.conv_context_size is {list(encoder.conv_context_size)}; it must be causal'
    norm = encoder.layers[0].conv.norm_type
    if norm not in NORMS:
        yield f'encoder.conv_norm_type is {norm}, which needs the whole utterance; use layer_norm'
    if encoder.reduction_position is not None:
        yield 'encoder.reduction is set; it must be null'
    subsampling = subsampling_of(encoder)
    kind = getattr(subsampling, '_subsampling', type(subsampling).__name__)
    if not isinstance(subsampling, ConvSubsampling) or kind not in SUBSAMPLINGS:
        yield f'encoder.subsampling is {kind}; streams need one of {SUBSAMPLINGS}, causal'
    if not subsampling.is_causal:
        yield 'encoder.causal_downsampling is false; it must be true'
    chunking = subsampling.subsampling_conv_chunking_factor
    if chunking != 1:
        yield f'encoder.subsampling_conv_chunking_factor is {chunking}; others than 1 treat the end differently'
    for place, module, kinds in _computed_parts(encoder):
        for method in ('forward', 'forward_internal'):
            known = [getattr(kind, method, None) for kind in kinds]
            if method in vars(module) or getattr(type(module), method, None) not in known:
                yield f'{place} is a {type(module).__name__} that is not computed as {kinds[0].__name__}'
    for name, module in encoder.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            yield f'encoder.{name}'.rstrip('.') + ' has forward hooks'


def _computed_parts(encoder) -> Iterator[tuple]:
    """Yield the modules whose computation streams repeat: place, module, and the classes that compute the same."""
    yield 'encoder', encoder, (ConformerEncoder,)
    yield 'encoder.pos_enc', encoder.pos_enc, (RelPositionalEncoding,)
    if encoder.out_proj is not None:
        yield 'encoder.out_proj', encoder.out_proj, (nn.Linear,)
    yield 'encoder.pre_encode', subsampling_of(encoder), (ConvSubsampling,)
    for name, module in subsampling_of(encoder).named_modules():
        if module._parameters:
            yield f'encoder.pre_encode.{name}', module, (nn.Linear,) if name == 'out' else (nn.Conv2d, CausalConv2D)
    for index, layer in enumerate(encoder.layers):
        place = f'encoder.layers.{index}'
        for name, kind in {**LAYER, '.conv.batch_norm': NORMS[layer.conv.norm_type]}.items():
            yield place + name, layer.get_submodule(name.removeprefix('.')), (kind,)
        for name, adapter in enabled_adapters(layer).items():
            yield f'{place}.adapter_layer.{name}', adapter, (LinearAdapter,)
            yield (
                f'the strategy of {place}.adapter_layer.{name}',
                adapter.adapter_strategy,
                (ResidualAddAdapterStrategy,),
            )
