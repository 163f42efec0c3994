# SPDX-License-Identifier: Apache-2.0
"""The frames that count in a masked prediction loss, and whether they can be decoded without the others.

Shapes: B batch, F frames that decoder, masks and targets have in common, N frames that count, C classes, H codebooks.
"""

import inspect
from typing import NamedTuple

import torch

from nemo.collections.asr.losses.ssl_losses.mlm import IGNORED_TARGET, MLMLoss, MultiMLMLoss
from nemo.collections.asr.modules.ssl_modules.multi_softmax_decoder import MultiSoftmaxDecoder


class MaskedPredictions(NamedTuple):
    """What a model says of the frames that count; where none does, one frame with the target -100."""

    log_probs: torch.Tensor  # [N, C] or [N, C, H]
    targets: torch.Tensor  # [N] or [N, H] int64
    utterances: torch.Tensor  # [N] int64: index of each frame's utterance in the batch, rising


def select_counted(frames: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor):
    """Return the frames that count, and their targets and utterances. Waits for the device: for their number.

    Args:
        frames: [B, F, ...].
        targets: [B, F] or [B, F, H].
        counted: [B, F] bool.

    Returns:
        frames [N, ...], targets [N] or [N, H] and utterances [N]. Where none counts, the first frame with the target
        -100: kernels and their backward passes need one.
    """
    index = counted.flatten().nonzero().squeeze(1)
    if index.shape[0] == 0:
        index = index.new_zeros(1)
        targets = torch.full_like(targets, IGNORED_TARGET)
    # index_select's backward adds rows up; that of an index by two tensors sorts them first.
    chosen = frames.flatten(0, 1).index_select(0, index)
    return chosen, targets.flatten(0, 1).index_select(0, index), index.div(counted.shape[1], rounding_mode='floor')


def predict_counted(decoder, loss, encoded, tokens, masks, lengths) -> MaskedPredictions:
    """Decode the frames that count in the loss, and no others.

    Args:
        decoder, loss: for which :func:`why_not_frame_by_frame` finds no reason.
        encoded: [B, D, T]; lengths: its lengths [B].
        tokens: targets [B, S] or [B, S, H].
        masks: [B, D, M].
    """
    frames, targets, counted = loss.align(encoded.transpose(1, 2), tokens, masks, lengths)
    frames, targets, utterances = select_counted(frames, targets, counted)
    log_probs = decoder(encoder_output=frames.t().unsqueeze(0)).squeeze(0)
    return MaskedPredictions(log_probs, targets, utterances)


def why_not_frame_by_frame(decoder: torch.nn.Module, loss: torch.nn.Module) -> str | None:
    """Tell why this decoder and this loss cannot be given the frames that count alone; None: they can.

    Only those known to treat each frame by itself can: ``MultiSoftmaxDecoder`` of one 1 x 1 convolution, with
    ``MLMLoss`` or ``MultiMLMLoss``; subclasses, too, that leave their forward as it is.
    """
    if not has_forward_of(decoder, MultiSoftmaxDecoder):
        return f"the decoder {type(decoder).__name__} may look at neighbouring frames"
    if any(getattr(layer, 'kernel_size', None) != (1,) for layer in decoder.decoder_layers):
        return f"{type(decoder).__name__}.decoder_layers are more than a convolution of one frame"
    if not has_forward_of(loss, MLMLoss, MultiMLMLoss):
        return f"the loss {type(loss).__name__} may need every frame"
    if isinstance(loss, MLMLoss) and not (decoder.squeeze_single and decoder.num_decoders == 1):
        return f"{type(loss).__name__} takes one codebook, squeezed"
    return None


def has_forward_of(module: torch.nn.Module, *classes: type) -> bool:
    """Tell whether a module's forward is that of one of these classes, not one that a subclass wrote anew."""
    forward = inspect.getattr_static(type(module), 'forward')  # typecheck's wrapper is made anew on each normal access
    return any(forward is inspect.getattr_static(known, 'forward') for known in classes)
