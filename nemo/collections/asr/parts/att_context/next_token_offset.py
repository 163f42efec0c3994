# SPDX-License-Identifier: Apache-2.0
"""Which tokens an encoder's output has not heard yet, so that it can be asked for them. New in this project.

NEST-RQ (https://arxiv.org/abs/2409.08680) predicts the next tokens of BEST-RQ with a causal encoder. Here the first of
them follows from the encoder: from its subsampling, its convolutions and the attention of all its layers.
"""

import math

from torch import nn

from nemo.collections.asr.parts.att_context.context import UNLIMITED
from nemo.collections.asr.parts.att_context.receptive_field import chunk_end_look_ahead, receptive_field
from nemo.collections.asr.parts.att_context.windows import STYLES

NORMS_OF_ONE_FRAME = ('layer_norm', 'fused_batch_norm')  # in the convolution modules; others mix frames in training


def next_token_offset(encoder, after_subsampling: bool, att_context_size=None, at_chunk_end: bool = False) -> int:
    """Return how many tokens after its own an encoder frame can be asked for, without having heard it.

    Frame j of the output has heard all features up to ``8 * (j + look-ahead) + ahead`` at factor 8: the look-ahead is
    that of attention and convolutions, ``ahead`` that of the subsampling (0 if it is causal). Token i is made of the
    features ``8 * i`` to ``8 * i + 7``, or, after the subsampling, of subsampled frame i. A token of features of which
    the first alone was heard is a next token: with a causal encoder the offset is 0.

    Args:
        encoder: a ``ConformerEncoder``.
        after_subsampling: whether tokens are made of subsampled frames (``mask_position: post_conv``).
        att_context_size: the batch's context; None takes the encoder's present one.
        at_chunk_end: return the offset of the last frame of a chunk, which has the smallest look-ahead.

    Raises:
        ValueError: with the reason, if there is no such token; see :func:`why_no_next_token`.
    """
    reason = why_no_next_token(encoder, att_context_size)
    if reason is not None:
        raise ValueError(f"the encoder cannot predict next tokens: {reason}")
    look_ahead = receptive_field(encoder, att_context_size).right
    if at_chunk_end:
        look_ahead = chunk_end_look_ahead(encoder, att_context_size)[1]
    if after_subsampling:
        return look_ahead + 1
    return look_ahead + math.ceil(_features_ahead(encoder) / encoder.subsampling_factor)


def why_no_next_token(encoder, att_context_size=None) -> str | None:
    """Return why every token has been heard, or may have been, by an encoder's output; None: there are next ones.

    Args:
        encoder: any.
        att_context_size: the batch's context; None takes the encoder's present one.
    """
    if not hasattr(encoder, 'effective_windows'):
        return f"what an output of {type(encoder).__name__} has heard is not known"
    if encoder.att_context_style not in STYLES:
        return f"att_context_style is {encoder.att_context_style}, whose windows are not known (known are {STYLES})"
    if getattr(encoder, 'self_attention_model', None) == 'rel_pos_local_attn':
        return "self_attention_model is rel_pos_local_attn, which may attend to the whole utterance; use rel_pos"
    if getattr(encoder, 'reduction_subsampling', None) is not None:
        return "encoder.reduction makes frames of several frames, between the layers"
    if _features_ahead(encoder) is None:
        return f"how far encoder.subsampling looks ahead is not known for {type(encoder.pre_encode).__name__}"
    norms = {layer.conv.norm_type for layer in encoder.layers} - set(NORMS_OF_ONE_FRAME)
    if norms:
        return (
            f"encoder.conv_norm_type is {', '.join(sorted(norms))}, which normalises by frames that are to be "
            f"predicted; use {NORMS_OF_ONE_FRAME[0]}"
        )
    if receptive_field(encoder, att_context_size).right == UNLIMITED:
        context = list(encoder.att_context_size if att_context_size is None else att_context_size)
        return f"in att_context_size {context} an output hears the whole utterance; the right context must be limited"
    return None


def _features_ahead(encoder) -> int | None:
    """Return the last feature that frame 0 of the subsampling has heard; None if that is not known."""
    module = getattr(encoder.pre_encode, 'pre_encode', encoder.pre_encode)  # without the wrapper of post-conv masking
    if isinstance(module, nn.Linear):
        return 0
    layers = getattr(module, 'conv', None)
    if layers is None:  # StackingSubsampling
        return module.subsampling_factor - 1 if hasattr(module, 'proj_out') else None
    heard = 0
    for layer in reversed(list(layers.modules())):
        if isinstance(layer, nn.Conv2d):
            before = getattr(layer, '_left_padding', layer.padding[0])  # NeMo's causal convolution pads by itself
            heard = heard * layer.stride[0] - before + layer.kernel_size[0] - 1
        elif isinstance(layer, (nn.Conv1d, nn.MaxPool2d)):
            return None
    return heard
