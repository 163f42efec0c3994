# SPDX-License-Identifier: Apache-2.0
"""Prediction of masked tokens (NEST, https://arxiv.org/abs/2408.13106)."""

import inspect

import torch

from nemo.collections.asr.losses.ssl_losses.mlm import MLMLoss, MultiMLMLoss, has_target
from nemo.collections.asr.modules.ssl_modules.multi_softmax_decoder import MultiSoftmaxDecoder
from nemo.collections.asr.parts.objectives import base
from nemo.collections.asr.parts.objectives.base import BatchRecord, FrameScores, Logs, LossPositions
from nemo.utils import logging


class MaskedTokens(base.Objective):
    """Predicts the tokens of masked frames, by the model's ``decoder`` and ``loss``.

    Logits are computed at the loss positions alone, or for all frames where decoder or loss may need them.
    """

    name, masks = 'masked', True

    def loss(self, record: BatchRecord) -> tuple[torch.Tensor, Logs]:
        """Return the loss of a pass; see :class:`Objective`."""
        decoder, loss = self.model.decoder, self.model.loss
        if why_all_frames(decoder, loss) is None:
            log_probs, targets, utterances = self.predictions(record)
            losses = loss.of_frames(log_probs, targets, reduction='none')
            return self.mean_over_tokens(losses, has_target(targets), utterances), {}
        arguments = dict(masks=record.masks, targets=record.tokens, decoder_lengths=record.encoded_lengths)
        return loss(decoder_outputs=decoder(encoder_output=record.encoded), **arguments), {}

    def predictions(self, record: BatchRecord) -> LossPositions:
        """Return the log-probabilities at the loss positions of a pass."""
        decoder, loss = self.model.decoder, self.model.loss
        aligned = record.tokens, record.masks, record.encoded_lengths
        if why_all_frames(decoder, loss) is None:
            frames = record.encoded.transpose(1, 2)  # type: ignore[union-attr]
            return base.gather_loss_positions(*loss.align(frames, *aligned)).decoded(decoder)
        return base.gather_loss_positions(*loss.align(decoder(encoder_output=record.encoded), *aligned))

    def scores(self, record: BatchRecord) -> dict[str, FrameScores]:
        """Score a pass; see :class:`Objective`."""
        return {self.name: FrameScores.of(self.predictions(record), self.model.loss)}

    def check(self) -> None:
        """Check the loss's ``decoder_offset``, and that masked frames can be predicted in every context."""
        model = self.model
        if reason := why_all_frames(model.decoder, model.loss):
            if model.cfg.get('loss_over') == 'global':
                raise ValueError(f"model.loss_over is global; it must be rank: {reason}")
            logging.warning(f"Each step computes logits for all frames, not only at the loss positions: {reason}.")
        offset = getattr(model.loss, 'decoder_offset', None)
        if model.pre_encoder is not None:
            if offset:
                raise ValueError(
                    f"model.loss.decoder_offset is {offset} with mask_position post_conv; it must be 0, for target i "
                    "is made of encoder frame i"
                )
        elif offset == 0 and model.cfg.encoder.get('causal_downsampling', False):
            logging.warning(
                "model.loss.decoder_offset is 0 with causal_downsampling: the receptive field of encoder frame i ends "
                "at the beginning of target i. Set model.loss.decoder_offset=1."
            )
        model.check_frames_see_others()


def why_all_frames(decoder: torch.nn.Module, loss: torch.nn.Module) -> str | None:
    """Return why this decoder and this loss may need all frames; None: they treat each frame by itself."""
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
    """Return whether a module's forward is that of one of these classes, and no subclass overrides it."""
    forward = inspect.getattr_static(type(module), 'forward')  # typecheck makes a new wrapper on each normal access
    return any(forward is inspect.getattr_static(known, 'forward') for known in classes)
