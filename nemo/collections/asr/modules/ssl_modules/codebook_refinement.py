# SPDX-License-Identifier: Apache-2.0
"""Codebooks that move to where the frames are: spherical k-means, a step every so many training steps.

Every code becomes the direction of the mean of the unit vectors that chose it. A code that hardly any frame chose
takes half of the frames of one that many chose, as in the algorithm of Linde, Buzo and Gray (1980).

Shapes: H codebooks, C classes, K code dimensions, N frames of a batch.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from nemo.collections.asr.parts.utils.config_keys import Refine

DEAD_SHARE = 0.05  # of the frames that a code has on average: a code with fewer is replaced
SMALLEST_SPREAD = 1e-3  # of the frames of a code, to be split: rounding alone spreads equal vectors by less
# Sums are whole multiples of 2^-32, so their order changes no digit: neither the threads of a GPU nor the number of
# ranks matters. An int64 holds 2^31 unit vectors of them.
FIXED_POINT = 2.0**32


class CodebookRefinement(nn.Module):
    """Gathers which frames chose each code, and moves the codes to them; its buffers are the same on every rank.

    Args:
        num_books, num_classes, code_dim: H, C, K.
        refine: the section ``model.quantizer.refine``. At ``decay`` 0 a refinement is a step of k-means on the frames since
            the last one; else the weight of earlier frames shrinks by it at each refinement.

    Raises:
        ValueError: naming the key of ``refine``, its value and what is allowed.
    """

    remembered: torch.Tensor

    def __init__(self, num_books: int, num_classes: int, code_dim: int, refine: Mapping):
        super().__init__()
        self.settings = settings = Refine.parse(refine)
        if settings.until_step < settings.every_n_steps:
            until, every = f'{Refine.name}.until_step', f'{Refine.name}.every_n_steps'
            raise ValueError(f"{until} is {settings.until_step}; it must be {every} or more, {settings.every_n_steps}")
        self.observing = True
        """Whether frames still matter, because a refinement is yet to come; :meth:`is_due` keeps it."""
        self.last_batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        """The three arguments of the latest :meth:`observe`; not in checkpoints."""
        shape = num_books, num_classes, code_dim + 1
        # Per code, K sums and then a count; of the frames since the last refinement, and of those before, decayed.
        self.register_buffer('observed', torch.zeros(shape, dtype=torch.int64))
        self.register_buffer('remembered', torch.zeros(shape, dtype=torch.float64))
        self.register_buffer('refined_step', torch.zeros((), dtype=torch.int64))  # 0: none yet

    @torch.no_grad()
    def observe(self, vectors: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor) -> None:
        """Add a batch; with several ranks, that of each. Exchanges H x C x (K + 1) numbers, and synchronises nothing.

        Args:
            vectors: unit vectors [N, H, K], any floating dtype. One without a direction (digital silence), or not
                finite, adds nothing.
            tokens: the codes that they chose, [N, H] int64 from 0 to C - 1.
            valid: [N] bool, False for padding.
        """
        self.last_batch = vectors, tokens, valid
        books, classes, width = self.observed.shape
        vectors = vectors.double()
        norms = vectors.norm(dim=-1, keepdim=True)
        usable = valid.view(-1, 1, 1) & (norms > 0.5) & (norms < 2)
        units = torch.where(usable, vectors, 0.0) * FIXED_POINT
        rows = torch.cat([units.round().long(), usable.long()], dim=-1).view(-1, width)
        codes = tokens + classes * torch.arange(books, device=tokens.device)
        batch = rows.new_zeros(books * classes, width).index_add_(0, codes.flatten(), rows)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(batch)
        self.observed += batch.view_as(self.observed)

    def is_due(self, step: int) -> bool:
        """Return whether a refinement belongs before training step ``step`` and has not been done.

        A step can come several times: with gradient accumulation, and after a resume.
        """
        every, until = self.settings.every_n_steps, self.settings.until_step
        self.observing = step < until // every * every
        if step <= 0 or step > until or step % every:
            return False
        return step != int(self.refined_step)  # synchronises, in these steps alone

    @torch.no_grad()
    def refine(self, codebooks: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codebooks [H, C, K] refined, float64, and how many codes were replaced (a scalar).

        A code that no frame chose, and that is not replaced, stays.
        """
        remembered, observed = self.remembered.double(), self.observed.double()
        sums = remembered[..., :-1] + observed[..., :-1] / FIXED_POINT
        counts = remembered[..., -1] + observed[..., -1]
        lengths = sums.norm(dim=-1, keepdim=True)
        codes = F.normalize(torch.where(lengths > 0, sums, codebooks.double()), dim=-1)
        replaced = torch.stack([_split(*book) for book in zip(codes, sums, counts, codebooks.double(), strict=True)])
        self.remembered = self.settings.decay * torch.cat([sums, counts.unsqueeze(-1)], dim=-1)
        self.observed.zero_()
        self.refined_step.fill_(step)
        return codes, replaced.sum()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Load the buffers; start from zero with a checkpoint that has none of them."""
        names = ('observed', 'remembered', 'refined_step')
        if not any(prefix + name in state_dict for name in names):
            state_dict = {prefix + name: torch.zeros_like(getattr(self, name)) for name in names}
        super()._load_from_state_dict(state_dict, prefix, *args)


def _split(codes: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Let dead codes take half of the frames of those that most frames chose; each gives once at most.

    The two halves lie on both sides of the mean, one standard deviation of the frames apart from it, in the direction
    in which the dead code lay: no random numbers, and no two dead codes alike.

    Changes a codebook's ``codes``, the ``sums`` of the vectors, [C, K], and their ``counts`` [C], given the codes ``before``
    the refinement [C, K]; returns how many codes were replaced (a scalar).
    """
    order, mean, pairs = counts.argsort(stable=True), counts.mean(), len(counts) // 2
    dead, large = order[:pairs], order.flip(0)[:pairs]
    lengths, shares = sums[large].norm(dim=-1), counts[large]
    spread = ((1 - (lengths / shares.clamp(min=1)).square()).clamp(min=0) / max(codes.shape[-1] - 1, 1)).sqrt()
    replaced = (counts[dead] < DEAD_SHARE * mean) & (shares > mean.clamp(min=1)) & (spread > SMALLEST_SPREAD)

    parents, aside = codes[large], before[dead]
    aside = F.normalize(aside - (aside * parents).sum(dim=-1, keepdim=True) * parents, dim=-1)
    offsets = spread.unsqueeze(-1) * aside
    for place, half in ((dead, parents + offsets), (large, parents - offsets)):
        half = F.normalize(half, dim=-1)
        codes[place] = torch.where(replaced.unsqueeze(-1), half, codes[place])
        sums[place] = torch.where(replaced.unsqueeze(-1), half * lengths.unsqueeze(-1) / 2, sums[place])
        counts[place] = torch.where(replaced, shares / 2, counts[place])
    return replaced.sum()
