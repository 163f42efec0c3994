# SPDX-License-Identifier: Apache-2.0
"""Which encoders can stream, and what of their context a stream needs."""

import hashlib

from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.windows import STYLES, Window
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling

SUBSAMPLINGS = ('dw_striding', 'striding')
CONV_NORMS = ('batch_norm', 'fused_batch_norm', 'layer_norm')  # those that, in eval mode, take each frame by itself


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
        check_encoder_can_stream(encoder, context)
        self.encoder, self.context = encoder, context
        self.windows = encoder.effective_windows(context)
        self.contexts = tuple(window.context for window in self.windows)
        self.factor, self.style = encoder.subsampling_factor, encoder.att_context_style
        chunked = self.style == 'chunked_limited'
        self.chunk = Window(context, self.style).chunk
        self.waits = [0 if chunked else each.right for each in self.contexts]  # of each layer, in frames
        self.look_ahead = context.right if chunked else sum(self.waits)
        self.width = encoder.d_model if encoder.out_proj is None else encoder.out_proj.out_features
        weight = next(encoder.parameters())
        self.dtype, self.device = weight.dtype, weight.device

    def settings(self) -> dict:
        """Return what two encoders must have in common to share a stream."""
        return {
            'att_context_size': self.context.as_list(),
            'layer_contexts': [context.as_list() for context in self.contexts],
            'att_context_style': self.style,
            'dtype': str(self.dtype).removeprefix('torch.'),
            'encoder': shapes_digest(self.encoder),
        }


def shapes_digest(module) -> str:
    """Return a digest of the names and shapes of a module's parameters."""
    shapes = '\n'.join(f'{name} {list(value.shape)}' for name, value in module.named_parameters())
    return hashlib.sha256(shapes.encode()).hexdigest()[:12]


def check_encoder_can_stream(encoder, context: AttContext) -> None:
    """Raise ValueError, with the reason, if the encoder's output cannot be computed from a stream."""
    if not isinstance(encoder, ConformerEncoder):
        raise ValueError(f"{type(encoder).__name__} cannot be streamed; the encoder must be a ConformerEncoder")
    if encoder.self_attention_model != 'rel_pos':
        raise ValueError(
            f"encoder.self_attention_model is {encoder.self_attention_model}, which cannot be streamed; use rel_pos"
        )
    if encoder.att_context_style not in STYLES:
        raise ValueError(f"encoder.att_context_style is {encoder.att_context_style}; streams need one of {STYLES}")
    encoder.check_att_context_size(context)
    for index, effective in enumerate(encoder.effective_att_contexts(context)):
        if effective.right == UNLIMITED:
            raise ValueError(
                f"att_context_size {context.as_list()} cannot be streamed: the right context of layer {index} is "
                "unlimited, so that the first frame waits for the last"
            )
    _check_convolutions(encoder)
    _check_subsampling(encoder)


def _check_convolutions(encoder) -> None:
    if encoder.conv_context_size[1] != 0 or getattr(encoder, 'conv_context_style', 'regular') != 'regular':
        raise ValueError(
            f"encoder.conv_context_size is {list(encoder.conv_context_size)}: its convolutions are not causal; a "
            "stream needs conv_context_size: causal"
        )
    norm = encoder.layers[0].conv.norm_type
    if norm not in CONV_NORMS:
        raise ValueError(f"encoder.conv_norm_type is {norm}, which needs the whole utterance; use layer_norm")
    if encoder.reduction_position is not None:
        raise ValueError("encoder.reduction is set, which a stream cannot follow; set it null")


def _check_subsampling(encoder) -> None:
    subsampling = getattr(encoder.pre_encode, 'pre_encode', encoder.pre_encode)
    if not isinstance(subsampling, ConvSubsampling) or subsampling._subsampling not in SUBSAMPLINGS:
        name = getattr(subsampling, '_subsampling', type(subsampling).__name__)
        raise ValueError(f"encoder.subsampling is {name}; streams need one of {SUBSAMPLINGS}, causal")
    if not subsampling.is_causal:
        raise ValueError("encoder.causal_downsampling is false; a stream needs causal_downsampling: true")
    if subsampling.subsampling_conv_chunking_factor != 1:
        raise ValueError(
            "encoder.subsampling_conv_chunking_factor is "
            f"{subsampling.subsampling_conv_chunking_factor}; streams need 1, for others treat the end differently"
        )
