# SPDX-License-Identifier: Apache-2.0
"""The loss of next tokens from log-probabilities of all frames; a model has those of its loss positions only."""

from nemo.collections.asr.losses.ssl_losses.mlm import has_target
from nemo.collections.asr.losses.ssl_losses.next_token import align_next_tokens


def loss_of_all_pairs(loss, log_probs, tokens, offset, *lengths):
    """Return the mean over all pairs of log-probabilities [B, T, K, C] or [B, T, K, C, H] by a loss of frames."""
    outputs, wanted, _ = align_next_tokens(log_probs, tokens, log_probs.shape[2], offset, *lengths)
    losses = loss.of_frames(outputs, wanted, reduction='none')
    return losses.sum() / has_target(wanted, dimensions=3).sum().clamp(min=1)
