# SPDX-License-Identifier: Apache-2.0
"""Masks that depend on an utterance's audio only, to repeat and compare measurements.

Shapes: B batch, N samples, D features, M mask frames.
"""

import random
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from nemo.collections.asr.parts.att_context.visible_frames import window_of_masking
from nemo.collections.asr.parts.att_context.windows import Window


def utterance_seeds(signal: torch.Tensor, lengths: torch.Tensor, seed: int) -> list[int]:
    """Return a 32-bit seed for each utterance from its samples or features [B, ..., N] and length [B].

    Neither padding, nor the batch around it, nor the rank changes it. Synchronises host and device.
    """
    rows = zip(signal.float().cpu(), lengths.tolist(), strict=True)
    return [zlib.crc32(row[..., :length].numpy().tobytes(), seed) for row, length in rows]


class FixedMasks:
    """A masking that hides the same in every call, to be passed where a masking module is called.

    The first call masks each utterance by itself, cut to its length, after seeding Python's, NumPy's and torch's
    generators, which are afterwards as they were. Later calls, for the same features, return the same again. A masking
    that takes a context gets the window.
    """

    def __init__(self, masking: torch.nn.Module, seeds: Sequence[int], window: Window):
        self._masking, self._seeds = masking, seeds
        self._arguments = window_of_masking(masking, window)
        self._drawn: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, input_feats: torch.Tensor, input_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masked features and the masks, [B, D, M] each."""
        if self._drawn is None:
            self._drawn = self._mask_one_by_one(input_feats, input_lengths)
        return self._drawn

    def _mask_one_by_one(self, feats, lengths):
        masked, masks = feats.clone(), torch.zeros_like(feats)
        with isolate_rng():
            for row, (seed, length) in enumerate(zip(self._seeds, lengths.tolist(), strict=True)):
                length = min(max(int(length), 1), feats.shape[-1])
                for seed_generator in (random.seed, np.random.seed, torch.manual_seed):
                    seed_generator(seed)
                one = dict(input_feats=feats[row : row + 1, :, :length], input_lengths=lengths[row : row + 1])
                (masked[row, :, :length],), (masks[row, :, :length],) = self._masking(**one, **self._arguments)
        return masked, masks
