# SPDX-License-Identifier: Apache-2.0
"""How surprising a live stream is to a model that predicts the next tokens.

Frame j predicts, at the first horizon, token j + offset, of which at most the first feature is in its receptive field.
The prediction waits until the token's own frames have arrived. No frame predicts the tokens before the first frame's.

Shapes: B streams, D the encoder's width, A attention frames, S target frames, K horizons, C classes, H codebooks.
"""

from dataclasses import dataclass

import torch

from nemo.collections.asr.parts.objectives.next_tokens import NextTokens
from nemo.collections.asr.parts.streaming.decoding import decode_frames
from nemo.collections.asr.parts.streaming.state import joined


@dataclass
class SurprisedStream:
    """The state of one stream whose tokens are compared with their predictions."""

    start: int
    """Index of the token whose surprise is the next to be known."""
    unpredicted: int
    """Tokens still to come that no frame predicts."""
    tokens: torch.Tensor | None = None
    """Tokens without a prediction so far, [S] or [S, H]."""
    log_probs: torch.Tensor | None = None
    """Predictions at the first horizon without a token so far, [A, C] or [A, C, H]."""


class LiveSurprise:
    """Predicts the next tokens of streams, and compares them with what came.

    Args:
        model: whose objective predicts next tokens: ``model.objective`` is ``next_token`` or ``both``.
        context: the attention context that the streams are encoded in.

    Raises:
        ValueError: with the reason, if the model predicts no next tokens, or not in this context.
    """

    def __init__(self, model, context):
        objectives = getattr(model, 'objectives', None)
        objective = None if objectives is None else objectives.find(NextTokens)
        if objective is None:
            kind, named = type(model).__name__, getattr(model, 'objective', None)
            raise ValueError(
                "return_surprise is True; it needs a model that predicts next tokens, with model.objective "
                f"next_token or both, and this {kind} " + (f"has {named}" if named else "has no objective")
            )
        if objective.at_chunk_end:
            raise ValueError("return_surprise: model.next_token.positions is chunk_end; it must be all")
        combined, needed = getattr(model.quantizer, 'combine_time_steps', 1), model.mask_frames_per_attention_frame
        if combined != needed:
            raise ValueError(
                f"return_surprise: model.quantizer.combine_time_steps is {combined}; it must be {needed}, the feature "
                "frames of an encoder frame"
            )
        try:
            self.offset = objective.offset(context)
        except ValueError as error:
            raise ValueError(f"return_surprise: {error}") from error
        self.decoders, self.loss = model.next_token_decoders, objective.token_loss

    def new_stream(self) -> SurprisedStream:
        """The state of a stream before its first frame."""
        return SurprisedStream(start=self.offset, unpredicted=self.offset)

    def predict(self, encoded: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the next tokens of new frames [B, D, A], of which ``valid`` [B, A] are a stream's own.

        Returns:
            the likeliest tokens [B, A, K] or [B, A, K, H] int64, 0 where there is no frame; and the log-probabilities
            of the first horizon, [B, A, C] or [B, A, C, H].
        """
        predictions = [decode_frames(decoder, encoded) for decoder in self.decoders]
        tokens = torch.stack([log_probs.argmax(dim=2) for log_probs in predictions], dim=2)
        return tokens * valid.view(*valid.shape, *[1] * (tokens.dim() - 2)), predictions[0]

    def take_tokens(self, stream: SurprisedStream, tokens: torch.Tensor) -> None:
        """Take new tokens [S] or [S, H]."""
        skipped = min(stream.unpredicted, tokens.shape[0])
        stream.unpredicted -= skipped
        stream.tokens = joined(stream.tokens, tokens[skipped:])

    def score(self, stream: SurprisedStream, log_probs: torch.Tensor) -> torch.Tensor:
        """Take new predictions at the first horizon, [A, C] or [A, C, H].

        Returns:
            the surprise of all tokens that have now come and were predicted: nats, the mean over codebooks, [S].
        """
        log_probs = joined(stream.log_probs, log_probs)
        ready = 0 if stream.tokens is None else min(log_probs.shape[0], stream.tokens.shape[0])
        stream.log_probs = log_probs[ready:].clone()
        if stream.tokens is None or not ready:
            return log_probs.new_zeros(0)
        surprise, _ = self.loss.of_horizon(log_probs[:ready], stream.tokens[:ready])
        stream.tokens = stream.tokens[ready:].clone()
        stream.start += ready
        return surprise
