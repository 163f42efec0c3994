# SPDX-License-Identifier: Apache-2.0
"""Masks of all arms that hide the same share of the speech, and of one arm that hide it in runs as long as another's.

The share of an arm is the mean over the contexts that its batches draw alike. It rises with ``mask_prob``, step by
step and without noise, for the same random numbers are drawn whatever the probability is: so it is found by halving.
"""

from typing import NamedTuple

import torch
from context_free_masking import ContextFreeMasking

from nemo.collections.asr.modules.ssl_modules.masking import RandomBlockMasking
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.ssl_reports.audit import audit_masking

FACTOR = 8  # feature frames in an attention frame
HALVINGS = 14
LARGEST = 0.5  # mask_prob that is tried
BLOCK, PROBABILITY = 40, 0.01  # NEST's, which the synchronised arm has


class Masks(NamedTuple):
    """Which masks an arm has."""

    contexts: tuple
    """[left, right] of the batches' tightest layers; each batch has one of them."""
    follows: bool
    """Whether they follow these."""
    block_size: int = BLOCK
    """In feature frames."""
    mask_prob: float = PROBABILITY


class Measured(NamedTuple):
    """What masks were found to hide."""

    masked_share: float
    """Of the feature frames."""
    counted_share: float
    """Of the attention frames: those that are hidden so far that the loss asks for them."""
    mean_run: float
    """Length of a run of these, in attention frames."""
    unanswerable_share: float
    """Of these, those that see nothing in their context that is not hidden."""


def measure(masks: Masks, lengths: torch.Tensor, seed: int = 0) -> Measured:
    """Measure what masks hide in utterances of these lengths, in feature frames [B]."""
    masking = (RandomBlockMasking if masks.follows else ContextFreeMasking)(
        feat_in=1,
        mask_prob=masks.mask_prob,
        block_size=masks.block_size,
        allow_overlap=True,
        causal=masks.follows,
        subsampling_factor=FACTOR,
    )
    audits = []
    for context in masks.contexts:
        windows = {'layers': Window(AttContext(*context))}
        audits.append(audit_masking(masking, lengths, 1, FACTOR, windows, draws=1, seed=seed))
    total = sum(audits[1:], audits[0])
    counted = total.frames_masked / total.frames.clamp(min=1)
    return Measured(
        total.masked_share().item(),
        counted.item(),
        total.mean_run().item(),
        total.unanswerable_share()['layers'].item(),
    )


def with_share(masks: Masks, share: float, lengths: torch.Tensor) -> Masks:
    """Return the masks with the ``mask_prob`` at which they hide a share of the feature frames."""
    low, high = 0.0, LARGEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if measure(masks._replace(mask_prob=middle), lengths).masked_share < share:
            low = middle
        else:
            high = middle
    return masks._replace(mask_prob=(low + high) / 2)


def with_share_and_run(masks: Masks, share: float, run: float, lengths: torch.Tensor) -> Masks:
    """Return the masks with the ``block_size`` and ``mask_prob`` at which share and mean run come nearest to these."""
    low, high = 1, masks.block_size
    tried = {}

    def mean_run(block: int) -> float:
        tried[block] = with_share(masks._replace(block_size=block), share, lengths)
        return measure(tried[block], lengths).mean_run

    runs = {block: mean_run(block) for block in (low, high)}
    while high - low > 1:
        middle = (low + high) // 2
        runs[middle] = mean_run(middle)
        low, high = (middle, high) if runs[middle] < run else (low, middle)
    return tried[min((low, high), key=lambda block: abs(runs[block] - run))]


def calibrated(masks: dict[str, Masks], reference: str, short: str, lengths: torch.Tensor) -> dict[str, dict]:
    """Give all masks the share of one arm, and those of another its runs, too.

    Args:
        masks: by arm.
        reference: the arm that is left as it is.
        short: the arm whose blocks are made shorter.
        lengths: of the training utterances, in feature frames [B].

    Returns:
        by arm, ``block_size``, ``mask_prob`` and what was measured.
    """
    wanted = measure(masks[reference], lengths)
    found = {}
    for arm, given in masks.items():
        if arm == short:
            given = with_share_and_run(given, wanted.masked_share, wanted.mean_run, lengths)
        elif given != masks[reference]:
            given = with_share(given, wanted.masked_share, lengths)
        made = {'block_size': given.block_size, 'mask_prob': given.mask_prob}
        found[arm] = {**made, **measure(given, lengths)._asdict()}
    return found
