# SPDX-License-Identifier: Apache-2.0
"""How far an encoder of several layers sees, in attention frames, and a table of it.

``encoder`` is a ``ConformerEncoder`` and ``att_context_size`` the batch's context; None takes the encoder's present one.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import nn

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.windows import STYLES, Window

NORMS_OF_ONE_FRAME = ('layer_norm', 'fused_batch_norm')  # in the convolution modules; others mix frames in training


def receptive_field(encoder: Any, att_context_size: Any = None) -> AttContext:
    """Return what the encoder's outputs depend on, by attention and convolution through all layers.

    The right side is the look-ahead. Under ``chunked_limited`` it is the field of the frame that sees most.
    """
    return _field_of(encoder.effective_windows(att_context_size), *encoder.conv_context_size)


def stack_window(encoder: Any, att_context_size: Any = None) -> Window | None:
    """Return the receptive field of the encoder as a window; None if layers' windows are not known."""
    if getattr(encoder, 'att_context_style', None) not in STYLES or not hasattr(encoder, 'effective_windows'):
        return None
    return Window(receptive_field(encoder, att_context_size))


@lru_cache(maxsize=1024)  # used in each training step
def _field_of(windows: tuple[Window, ...], before: int, after: int) -> AttContext:
    left = right = 0.0
    for frame in range(math.lcm(*(window.chunk for window in windows))):  # beyond it everything repeats
        first, last = _seen(frame, windows, before, after)
        left, right = max(left, frame - first), max(right, last - frame)
    return AttContext(*(UNLIMITED if side == math.inf else int(side) for side in (left, right)))


def chunk_end_look_ahead(encoder: Any, att_context_size: Any = None) -> tuple[int, int]:
    """Return the frames of a chunk of the stack, in whole chunks of layers, and its last one's look-ahead."""
    windows = encoder.effective_windows(att_context_size)
    chunk = math.lcm(*(window.chunk for window in windows))
    return chunk, int(_seen(chunk - 1, windows, *encoder.conv_context_size)[1]) - (chunk - 1)


def look_ahead_ms(encoder: Any, att_context_size: Any, frame_ms: float) -> float | None:
    """Return the look-ahead of an output in ms of audio, by attention and convolutions, at most.

    None: it waits for the end of the utterance, or windows are not known. ``frame_ms`` are those of an attention frame.
    """
    window = stack_window(encoder, att_context_size)
    return None if window is None or window.context.right == UNLIMITED else window.context.right * frame_ms


def look_ahead_text(milliseconds: float | None) -> str:
    """Return what :func:`look_ahead_ms` found as text: ``1040 ms``, or ``all``."""
    return 'all' if milliseconds is None else f'{milliseconds:g} ms'


def seen_through_layers(encoder: Any, frame: int, att_context_size: Any = None) -> list[tuple[float, float]]:
    """Return each layer's first and last input frame, or infinity, that an output depends on."""
    windows = encoder.effective_windows(att_context_size)
    return [_seen(frame, windows[layer:], *encoder.conv_context_size) for layer in range(len(windows))]


def _seen(frame: int, windows: Sequence[Window], before: int, after: int) -> tuple[float, float]:
    """Go from an output down the layers, by convolution, then attention; infinite if unlimited."""
    first = last = frame
    for window in reversed(windows):
        first, last = window.bounds(first - before)[0], window.bounds(last + after)[1]
    lefts, rights = zip(*(window.context for window in windows))
    return -math.inf if UNLIMITED in lefts else first, math.inf if UNLIMITED in rights else last


def next_token_offset(
    encoder: Any, after_subsampling: bool, att_context_size: Any = None, at_chunk_end: bool = False
) -> int:
    """Return how many tokens after its own a frame predicts first: the first after its receptive field.

    The receptive field of output frame j ends at feature ``8 * (j + look-ahead) + ahead`` at factor 8; ``ahead`` is that
    of the subsampling, 0 if it is causal. Token i is made of the features ``8 * i`` to ``8 * i + 7``, or, ``after_subsampling``
    (``mask_position: post_conv``), of subsampled frame i. A token of which the first feature alone is in it counts as a
    next token: with a causal encoder the offset is 0. ``at_chunk_end`` is for the last frame of a chunk.

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


def why_no_next_token(encoder: Any, att_context_size: Any = None) -> str | None:
    """Return why every token is, or may be, in an output's receptive field; None: there are next ones."""
    if not hasattr(encoder, 'effective_windows'):
        return f"the receptive field of {type(encoder).__name__} is not known"
    if encoder.att_context_style not in STYLES:
        return f"att_context_style is {encoder.att_context_style}, whose windows are not known (known are {STYLES})"
    if encoder.self_attention_model == 'rel_pos_local_attn':
        return "self_attention_model is rel_pos_local_attn, which may attend to the whole utterance; use rel_pos"
    if encoder.reduction_subsampling is not None:
        return "encoder.reduction makes frames of several frames, between the layers"
    if _features_ahead(encoder) is None:
        return f"the look-ahead of encoder.subsampling is not known for {type(encoder.pre_encode).__name__}"
    norms = {layer.conv.norm_type for layer in encoder.layers} - set(NORMS_OF_ONE_FRAME)
    if norms:
        return (
            f"encoder.conv_norm_type is {', '.join(sorted(norms))}, which normalises by frames that are to be "
            f"predicted; use {NORMS_OF_ONE_FRAME[0]}"
        )
    if receptive_field(encoder, att_context_size).right == UNLIMITED:
        context = list(encoder.att_context_size if att_context_size is None else att_context_size)
        return f"in att_context_size {context} the receptive field is the whole utterance; the right context must be limited"
    return None


def _features_ahead(encoder: Any) -> int | None:
    """Return the last feature in the receptive field of subsampled frame 0; None if not known."""
    module = getattr(encoder.pre_encode, 'pre_encode', encoder.pre_encode)  # without the wrapper of post-conv masking
    if isinstance(module, nn.Linear):
        return 0
    layers = getattr(module, 'conv', None)
    if layers is None:  # StackingSubsampling
        return module.subsampling_factor - 1 if hasattr(module, 'proj_out') else None
    last = 0
    for layer in reversed(list(layers.modules())):
        if isinstance(layer, nn.Conv2d):
            before = getattr(layer, '_left_padding', layer.padding[0])  # NeMo's causal convolution pads by itself
            last = last * layer.stride[0] - before + layer.kernel_size[0] - 1
        elif isinstance(layer, (nn.Conv1d, nn.MaxPool2d)):
            return None
    return last


def context_table(encoder: Any, frame_ms: float) -> str:
    """Return a table of what each layer attends to in each context; ``frame_ms`` per attention frame."""
    if encoder.att_context_style not in STYLES:
        return f'Attention contexts: {encoder.att_context_size_all}, att_context_style {encoder.att_context_style}'

    def size(context: AttContext) -> str:
        milliseconds = ', '.join(f'{max(side * frame_ms, UNLIMITED):g}' for side in context)
        return f'{context.as_list()} ([{milliseconds}] ms)'

    def length(*sides: int) -> str:
        return 'unlimited' if UNLIMITED in sides else f'{sum(sides)} frames ({sum(sides) * frame_ms:g} ms)'

    batches = [AttContext.parse(context) for context in encoder.att_context_size_all]
    layers = zip(encoder.layer_att_contexts(), *(encoder.effective_att_contexts(batch) for batch in batches))
    fields = [receptive_field(encoder, batch) for batch in batches]
    rows = [
        ['layer', 'own context', *(f'in {size(batch)}' for batch in batches)],
        *([str(index), *('-' if each is None else size(each) for each in row)] for index, row in enumerate(layers)),
        ['', 'total look-ahead', *(length(field.right) for field in fields)],
        ['', 'receptive field', *(length(*field, 1) for field in fields)],
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        [
            f'Attention contexts [left, right] in frames of {frame_ms:g} ms (-1 = unlimited), convolutions in the totals:',
            *('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows),
            f'Training draws from {encoder.att_context_policy}',
        ]
    )
