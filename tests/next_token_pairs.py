# SPDX-License-Identifier: Apache-2.0
"""The loss of next tokens from log-probabilities of all frames; a model has those of its loss positions only."""


def loss_of_all_pairs(loss, log_probs, tokens, offset, *lengths):
    """Return the mean of a ``NextTokenLoss`` over all pairs, of log-probabilities [B, T, K, C] or [B, T, K, C, H]."""
    outputs, wanted, _ = loss.align(log_probs, tokens, offset, *lengths)
    pairs = [loss.of_horizon(outputs[:, :, each], wanted[:, :, each]) for each in range(loss.horizons)]
    total, count = (sum(part.sum() for part in parts) for parts in zip(*pairs, strict=True))
    return total / count.clamp(min=1)
