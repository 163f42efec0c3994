# SPDX-License-Identifier: Apache-2.0
"""What a model makes of encoder frames that come a few at a time; its decoders take each frame by itself.

Shapes: B streams, D the encoder's width, A attention frames, C classes, H codebooks.
"""

import torch


def decoder_of(model) -> torch.nn.Module:
    """Return the decoder that the model's own forward runs.

    A model that predicts next tokens only has several: its first one. A hybrid model has two: the CTC decoder, because
    a transducer's takes no frame by itself.

    Raises:
        ValueError: if the model has no decoder that takes encoder frames alone.
    """
    decoder = getattr(model, 'ctc_decoder', None) or getattr(model, 'decoder', None)
    if not getattr(model, 'predicts_masked_tokens', True):
        decoder = model.next_token_decoders[0]
    if 'encoder_output' not in (getattr(decoder, 'input_types', None) or {}):
        raise ValueError(
            f"log-probabilities and tokens need a decoder that takes encoder_output; {type(model).__name__} has none"
        )
    return decoder


def decode_frames(decoder: torch.nn.Module, encoded: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [B, A, C] or [B, A, C, H] of frames [B, D, A], of which there may be none."""
    if encoded.shape[2]:
        return decoder(encoder_output=encoded)
    # a convolution takes no empty input; the classes are the same for any frame
    return decoder(encoder_output=encoded.new_zeros(*encoded.shape[:2], 1))[:, :0]
