# SPDX-License-Identifier: Apache-2.0
"""How much of a codebook the targets use, and whether they have collapsed.

Shapes: B batch, S target frames, H codebooks, C classes.
"""

from typing import NamedTuple

import torch

COLLAPSED_PERPLEXITY = 0.01  # of the classes
COLLAPSED_TOP_SHARE = 0.5  # of the frames


class CodebookStatistics(NamedTuple):
    """Scalars on the tokens' device; over several codebooks the worst one's."""

    codes_used: torch.Tensor
    perplexity: torch.Tensor
    top_share: torch.Tensor
    frames: torch.Tensor


class CodebookUse:
    """Counts tokens over the latest batches, in blocks, without waiting for the device.

    Not a module: it adds nothing to checkpoints. Each rank counts its own batches.

    Args:
        num_classes: C.
        num_books: H.
        batches_covered: batches that the statistics cover, the latest.
        blocks: parts of them; the oldest part is forgotten as a whole.
    """

    def __init__(self, num_classes: int, num_books: int = 1, batches_covered: int = 1000, blocks: int = 10):
        self.num_classes, self.num_books = num_classes, num_books
        blocks = min(blocks, batches_covered)
        self.batches_per_block = batches_covered // blocks
        self._most_blocks = blocks
        self.forget()

    def forget(self) -> None:
        """Drop all counts, and begin a new block: for when the codes change, and tokens no longer mean what they did.

        Counts from before and after a change add up to no distribution of tokens that there ever was, and could hide a
        collapse or feign one. Ask :meth:`collapse` first: what was counted since the last full block is never looked at
        otherwise, and where blocks are longer than the codes live no block is ever full.
        """
        self.batches = 0
        self._blocks: list[torch.Tensor] = []  # counts [H, C] each, the oldest first
        self._total: torch.Tensor | None = None  # their sum

    def update(self, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """Count a batch.

        Args:
            tokens: [B, S] or [B, S, H], int64.
            lengths: valid target frames [B].
        """
        tokens = tokens.unsqueeze(-1) if tokens.dim() == 2 else tokens
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device).unsqueeze(1)
        tokens = torch.where(valid.unsqueeze(-1), tokens, 0)  # whatever padding holds is no index
        books = torch.arange(self.num_books, device=tokens.device) * self.num_classes
        counts = torch.zeros(self.num_books * self.num_classes, dtype=torch.int64, device=tokens.device)
        counts.scatter_add_(0, (tokens + books).flatten(), valid.unsqueeze(-1).expand_as(tokens).flatten().long())
        counts = counts.view(self.num_books, self.num_classes)
        if self.batches % self.batches_per_block == 0:
            self._start_block(counts)
        self._blocks[-1] += counts
        self._total += counts
        self.batches += 1

    def _start_block(self, like: torch.Tensor) -> None:
        self._total = torch.zeros_like(like) if self._total is None else self._total
        self._blocks.append(torch.zeros_like(like))
        if len(self._blocks) > self._most_blocks:
            self._total -= self._blocks.pop(0)

    @property
    def block_is_complete(self) -> bool:
        """Whether the last batch ended a block: the time to check the statistics."""
        return self.batches > 0 and self.batches % self.batches_per_block == 0

    @property
    def counts(self) -> torch.Tensor | None:
        """The counts of the batches covered, [H, C]; None before the first batch."""
        return self._total

    def statistics(self, counts: torch.Tensor | None = None) -> CodebookStatistics:
        """Return the statistics of the batches covered, or of counts [H, C]; all zero before the first batch.

        Perplexity is exp of the entropy of the tokens' distribution: C at best, 1 if one code serves for all.
        """
        counts = self._total if counts is None else counts
        if counts is None:
            return CodebookStatistics(*torch.zeros(4))
        frames = counts.sum(dim=1, keepdim=True)
        shares = counts.float() / frames.clamp(min=1)
        perplexity = torch.special.entr(shares).sum(dim=1).exp()
        used = (counts > 0).sum(dim=1)
        return CodebookStatistics(used.min(), perplexity.min(), shares.max(), frames.min())

    def logs(self, counts: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return the scalars to log, on the tokens' device; of the batches covered, or of counts [H, C]."""
        statistics = self.statistics(counts)
        return {
            'codebook/codes_used': statistics.codes_used.float(),
            'codebook/perplexity': statistics.perplexity,
            'codebook/top_share': statistics.top_share,
        }

    def collapse(self) -> str | None:
        """Return how the targets have collapsed, or None. Synchronises host and device: not for every step."""
        used, perplexity, top_share, frames = torch.stack([value.double() for value in self.statistics()]).tolist()
        found = f'{used:.0f} of {self.num_classes} codes, perplexity {perplexity:.1f}, in {frames:.0f} frames'
        if frames and top_share > COLLAPSED_TOP_SHARE:
            return f'one code stands for {top_share:.0%} of the frames ({found})'
        floor = COLLAPSED_PERPLEXITY * self.num_classes
        if (
            frames >= 10 * floor and perplexity < floor
        ):  # a handful of frames cannot reach the floor, whatever they are
            return f'their perplexity is under {COLLAPSED_PERPLEXITY:.0%} of the classes ({found})'
        return None
