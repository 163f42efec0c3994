# SPDX-License-Identifier: Apache-2.0
"""How much of a codebook the targets use, and whether they have collapsed.

Shapes: B batch, S target frames, N tokens, H codebooks, C classes.
"""

from collections import deque

import torch

from nemo.utils import logging

COLLAPSED_PERPLEXITY = 0.01  # of the classes
COLLAPSED_TOP_SHARE = 0.5  # of the frames


class CodebookUse:
    """Counts the tokens of the latest blocks of a rank's batches; ``math.inf`` batches never end.

    At the end of each block it warns if the targets have collapsed; nothing else synchronises host and device.
    """

    def __init__(self, num_classes: int, num_books: int = 1, batches_per_block: float = 100, blocks: int = 10):
        self.num_classes, self.num_books = num_classes, num_books
        self.batches_per_block = batches_per_block
        self._blocks: deque[torch.Tensor] = deque(maxlen=blocks)  # counts [H, C] each, the oldest first
        self._batches = 0

    def update(self, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """Count the tokens [B, S] or [B, S, H] int64 of a batch, of so many valid frames [B] each."""
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device).unsqueeze(1)
        counts = token_counts(tokens.reshape(-1, self.num_books), self.num_books, self.num_classes, valid.flatten())
        if self._batches % self.batches_per_block == 0:
            self._blocks.append(counts)
        else:
            self._blocks[-1] += counts
        self._batches += 1
        if self._batches % self.batches_per_block == 0:
            self.check()

    @property
    def counts(self) -> torch.Tensor | None:
        """The counts of the batches covered, [H, C]; None before the first batch."""
        return torch.stack(tuple(self._blocks)).sum(dim=0) if self._blocks else None

    def check(self) -> None:
        """Warn if the targets have collapsed. Synchronises host and device."""
        counts = self.counts
        if counts is None:
            return
        used, perplexity, top_share, frames = (value.item() for value in statistics_of(counts).values())
        found = f'{used} of {self.num_classes} codes, perplexity {perplexity:.1f}, in {frames} frames'
        least = COLLAPSED_PERPLEXITY * self.num_classes
        if frames and top_share > COLLAPSED_TOP_SHARE:
            reason = f'one code stands for {top_share:.0%} of the frames'
        elif frames >= 10 * least and perplexity < least:  # a handful of frames cannot have more, whatever they are
            reason = f'their perplexity is under {COLLAPSED_PERPLEXITY:.0%} of the classes'
        else:
            return
        logging.warning(
            f"The targets have collapsed: {reason} ({found}). The loss will fall and nothing will be learned. Set "
            "model.target_normalize: per_feature, or normalise the features (model.preprocessor.normalize)."
        )


def statistics_of(counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return statistics of the counts of tokens [H, C], scalars; over several codebooks the worst one's.

    ``perplexity`` is exp of the entropy of the tokens' distribution: C at best, 1 if one code serves for all.
    """
    frames = counts.sum(dim=1, keepdim=True)
    shares = counts.float() / frames.clamp(min=1)
    perplexity = torch.special.entr(shares).sum(dim=1).exp().min()
    used = (counts > 0).sum(dim=1).min()
    return {'codes_used': used, 'perplexity': perplexity, 'top_share': shares.max(), 'frames': frames.min()}


def token_counts(tokens: torch.Tensor, books: int, classes: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return how often each token of each codebook occurs in ``valid`` [N] tokens [N, H]; [H, C]."""
    valid = torch.ones_like(tokens[:, 0], dtype=torch.bool) if valid is None else valid
    valid = valid.unsqueeze(1)
    index = torch.where(valid, tokens, 0) + classes * torch.arange(books, device=tokens.device)
    counts = torch.zeros(books * classes, dtype=torch.int64, device=tokens.device)
    return counts.scatter_add_(0, index.flatten(), valid.expand_as(index).flatten().long()).view(books, classes)
