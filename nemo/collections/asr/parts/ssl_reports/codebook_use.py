# SPDX-License-Identifier: Apache-2.0
"""How much of a codebook the targets use, and whether they have collapsed.

Shapes: B batch, S target frames, N tokens, H codebooks, C classes.
"""

from collections import deque

import torch

COLLAPSED_PERPLEXITY = 0.01  # of the classes
COLLAPSED_TOP_SHARE = 0.5  # of the frames


class CodebookUse:
    """Counts the tokens of the latest blocks of batches of a rank, without host-device synchronisation."""

    def __init__(self, num_classes: int, num_books: int = 1, batches_per_block: int = 100, blocks: int = 10):
        self.num_classes, self.num_books = num_classes, num_books
        self.batches_per_block = batches_per_block
        self._blocks: deque[torch.Tensor] = deque(maxlen=blocks)  # counts [H, C] each, the oldest first
        self.batches = 0

    def update(self, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """Count the tokens [B, S] or [B, S, H] int64 of a batch, of so many valid frames [B] each."""
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device).unsqueeze(1)
        counts = token_counts(tokens.reshape(-1, self.num_books), self.num_books, self.num_classes, valid.flatten())
        if self.batches % self.batches_per_block == 0:
            self._blocks.append(counts)
        else:
            self._blocks[-1] += counts
        self.batches += 1

    @property
    def block_is_complete(self) -> bool:
        """Whether the last batch ended a block: the time to check the statistics."""
        return self.batches > 0 and self.batches % self.batches_per_block == 0

    @property
    def counts(self) -> torch.Tensor | None:
        """The counts of the batches covered, [H, C]; None before the first batch."""
        return torch.stack(tuple(self._blocks)).sum(dim=0) if self._blocks else None

    def collapse(self) -> str | None:
        """Return how the targets have collapsed, or None. Synchronises host and device: not for every step."""
        counts = self.counts
        if counts is None:
            return None
        statistics = torch.stack([value.double() for value in statistics_of(counts).values()])
        used, perplexity, top_share, frames = statistics.tolist()
        found = f'{used:.0f} of {self.num_classes} codes, perplexity {perplexity:.1f}, in {frames:.0f} frames'
        if frames and top_share > COLLAPSED_TOP_SHARE:
            return f'one code stands for {top_share:.0%} of the frames ({found})'
        least = COLLAPSED_PERPLEXITY * self.num_classes
        if frames >= 10 * least and perplexity < least:  # a handful of frames cannot have more, whatever they are
            return f'their perplexity is under {COLLAPSED_PERPLEXITY:.0%} of the classes ({found})'
        return None


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
