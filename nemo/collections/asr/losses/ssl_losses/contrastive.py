# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``contrastive.py``: negatives are real frames, whatever lengths and masks are.

Shapes: B batch, D features, T feature frames, A attention frames, C channels, F features of a target frame, M masked
frames of the batch, N negatives.
"""

from typing import Any

import torch
import torch.nn.functional as F

from nemo.core import typecheck
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class ContrastiveLoss(_up.ContrastiveLoss):
    """NeMo's contrastive loss (wav2vec 2.0), for batches with padding and any number of masked frames.

    Frames at or beyond ``decoder_lengths`` are neither predicted nor drawn as negatives. An utterance with fewer
    candidates than ``num_negatives`` draws them with replacement. Where nothing is masked, the loss is zero and
    back-propagates. A target is made of ``combine_time_steps`` feature frames: NeMo divides the two lengths, which
    comes out wrong below some 0.6 s with causal downsampling.
    """

    def __init__(self, in_dim: int, *args: Any, **kwargs: Any):
        super().__init__(in_dim, *args, **kwargs)
        self._features_per_target = in_dim * self.combine_time_steps

    @typecheck()
    def forward(
        self,
        spectrograms: torch.Tensor,
        spec_masks: torch.Tensor,
        decoder_outputs: torch.Tensor,
        decoder_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss, a scalar: ``multiplier`` / B times the reduced cross entropy.

        Takes features and masks (1 where masked) [B, D, T], predictions [B, A, C], and how many of these are real [B];
        None: all.
        """
        if not self.sample_from_same_utterance_only and (self.group_loss or self.sample_from_codebook):
            # Negatives are codes, not frames.
            return super().forward(spectrograms=spectrograms, spec_masks=spec_masks, decoder_outputs=decoder_outputs)
        frames, combined = decoder_outputs.shape[1], self._features_per_target // spectrograms.shape[1]
        targets, perplexity_loss = self._project(_combine(spectrograms, combined, frames))
        real = torch.ones(targets.shape[:2], dtype=torch.bool, device=targets.device)
        if decoder_lengths is not None:
            real = torch.arange(frames, device=targets.device) < decoder_lengths.to(targets.device).unsqueeze(1)
        masked = (_combine(spec_masks, combined, frames).mean(-1) > self.mask_threshold) & real  # [B, A]
        chosen = masked.flatten().nonzero().squeeze(1)  # synchronises once; a mask would twice, and in backward passes
        outputs, positives = (x.flatten(0, 1).index_select(0, chosen) for x in (decoder_outputs, targets))
        if len(outputs):
            scores = self._calculate_similarity(
                outputs, self._negatives(targets, masked, real, len(outputs)), positives
            )
            first = torch.zeros(len(outputs), dtype=torch.long, device=outputs.device)
            loss = F.cross_entropy(scores.transpose(0, 1), first, reduction=self.reduce)  # scores [1 + N, M]
        else:
            loss = outputs.sum() + positives.sum()  # of nothing: zero, and it back-propagates to every weight
        if perplexity_loss is not None and self.prob_ppl_weight != 0:
            loss = loss + self.prob_ppl_weight * perplexity_loss * len(outputs)
        return loss * self.multiplier / spectrograms.shape[0]

    def _project(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return target vectors [B, A, C] of features [B, A, F], and the quantizer's own loss or None."""
        if not self.quantized_targets:
            return self.target_proj(targets), None
        targets, perplexity_loss, _, self.target_ids = self.quantizer(targets, return_ids=True)
        self.target_lengths = None
        if self.reduce_ids:  # keep one of each run of equal ids, and zeros after them
            run = F.pad((self.target_ids.diff(dim=1) != 0).cumsum(dim=1), (1, 0))
            self.target_lengths = run[:, -1] + 1
            kept = torch.zeros_like(self.target_ids).scatter(1, run, self.target_ids)
            self.target_ids = kept[:, : int(self.target_lengths.max())]
        return targets, perplexity_loss

    def _negatives(self, targets: torch.Tensor, masked: torch.Tensor, real: torch.Tensor, number: int) -> torch.Tensor:
        """Draw the negatives [N, M, C] of the ``number`` masked frames."""
        candidates = real if self.sample_from_non_masked else masked  # [B, A]
        if not self.sample_from_same_utterance_only:
            return self.sample_negatives(targets[candidates], number)[0]
        wanted, available = torch.stack([masked.sum(1), candidates.sum(1)]).tolist()
        frames = zip(targets[candidates].split(available), wanted)
        return torch.cat([self.sample_negatives(own, masks)[0] for own, masks in frames if masks], dim=1)

    def sample_negatives(self, y: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw ``num_negatives`` of the candidates y [K, C], with replacement where they are fewer.

        Returns:
            negatives [N, num, C] and their indices [num, N].
        """
        weights = torch.ones((num, len(y)), device=y.device)
        indices = torch.multinomial(weights, self.num_negatives, replacement=len(y) < self.num_negatives)
        return y[indices].transpose(0, 1), indices


def _combine(features: torch.Tensor, combined: int, frames: int) -> torch.Tensor:
    """Join feature frames [B, D, T] to A target frames, [B, A, F]; missing ones are zeros."""
    wanted = frames * combined
    features = F.pad(features, (0, max(wanted - features.shape[2], 0)))[..., :wanted]
    return features.transpose(1, 2).reshape(features.shape[0], frames, -1)
