# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``contrastive.py``: negatives are real frames, whatever the utterances' lengths and masks.

Shapes: B batch, D features, T feature frames, A attention frames, C channels, F features of a target frame, M masked
frames of the batch, N negatives, G groups of the quantizer.
"""

import torch
import torch.nn.functional as F

from nemo.core import typecheck
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class ContrastiveLoss(_up.ContrastiveLoss):
    """NeMo's contrastive loss (wav2vec 2.0), for batches with padding and any number of masked frames.

    Frames at or beyond ``decoder_lengths`` are neither predicted nor drawn as negatives. An utterance with fewer
    candidates than ``num_negatives`` draws them with replacement. Where nothing is masked, the loss is zero and
    back-propagates. A target is made of ``combine_time_steps`` feature frames, however few there are: NeMo divides the
    two lengths, which comes out wrong below some 0.6 s with causal downsampling.

    Args:
        decoder_offset: leading decoder frames to drop, see ``MLMLoss``; the other arguments are NeMo's.

    Raises:
        ValueError: if ``decoder_offset`` is negative.
    """

    def __init__(self, in_dim: int, *args, decoder_offset: int = 0, **kwargs):
        super().__init__(in_dim, *args, **kwargs)
        if decoder_offset < 0:
            raise ValueError(f"loss.decoder_offset is {decoder_offset}; it must be 0 decoder frames or more")
        self.decoder_offset = decoder_offset
        self._features_per_target = in_dim * self.combine_time_steps

    @typecheck()
    def forward(self, spectrograms, spec_masks, decoder_outputs, decoder_lengths=None):
        """Compute the loss, a scalar: ``multiplier`` / B times the reduced cross entropy.

        Args:
            spectrograms: features [B, D, T].
            spec_masks: 1 where masked [B, D, T].
            decoder_outputs: predictions [B, A, C].
            decoder_lengths: attention frames that are real [B], before the offset; None: all.
        """
        frames = decoder_outputs.shape[1]
        combined = self._features_per_target // spectrograms.shape[1]
        targets, perplexity_loss = self._project(_combine(spectrograms, combined, frames))
        real = self._real_frames(decoder_outputs, decoder_lengths)
        masked = (_combine(spec_masks, combined, frames).mean(-1) > self.mask_threshold) & real  # [B, A]
        # The last frames have no output any more, and are not real.
        decoder_outputs = F.pad(decoder_outputs[:, self.decoder_offset :], (0, 0, 0, min(self.decoder_offset, frames)))
        index = masked.flatten().nonzero().squeeze(1)  # synchronises once; a mask would twice, and in backward passes
        outputs, positives = (frames.flatten(0, 1).index_select(0, index) for frames in (decoder_outputs, targets))
        if self.group_loss and not self.sample_from_same_utterance_only:
            groups = self.quantizer.groups
            outputs, positives = (x.reshape(-1, x.shape[-1] // groups) for x in (outputs, positives))
        if len(outputs):
            scores = self._calculate_similarity(outputs, self._negatives(positives, targets, masked, real), positives)
            first = torch.zeros(len(outputs), dtype=torch.long, device=outputs.device)
            loss = F.cross_entropy(scores.transpose(0, 1), first, reduction=self.reduce)  # scores [1 + N, M]
        else:
            loss = outputs.sum() + positives.sum()  # of nothing: zero, and it back-propagates to every weight
        if perplexity_loss is not None and self.prob_ppl_weight != 0:
            loss = loss + self.prob_ppl_weight * perplexity_loss * len(outputs)
        return loss * self.multiplier / spectrograms.shape[0]

    def _project(self, targets):
        """Return target vectors [B, A, C] of features [B, A, F], and the quantizer's own loss, None without one."""
        if not self.quantized_targets:
            return self.target_proj(targets), None
        if not self.store_ids:
            return self.quantizer(targets)[:2]
        targets, perplexity_loss, _, self.target_ids = self.quantizer(targets, return_ids=True)
        self.target_lengths = None
        if self.reduce_ids:
            self.target_ids, self.target_lengths = _without_repetitions(self.target_ids)
        return targets, perplexity_loss

    def _negatives(self, positives, targets, masked, real):
        """Draw the negatives [N, M, C] (of groups: [classes, M G, C / G]) of the positives [M, C]."""
        candidates = real if self.sample_from_non_masked else masked
        if self.sample_from_same_utterance_only:
            return self._negatives_of_each_utterance(targets, masked, candidates)
        if self.group_loss:
            groups, classes = self.quantizer.groups, self.quantizer.num_vars
            of_group = self.quantizer.vars.reshape(groups, classes, -1).transpose(0, 1)
            return of_group.repeat(1, len(positives) // groups, 1)  # the whole codebook
        if self.sample_from_codebook:
            return self.quantizer.sample_from_codebook(self.num_negatives, len(positives))
        return self.sample_negatives(targets[candidates], len(positives))[0]

    def _negatives_of_each_utterance(self, targets, masked, candidates):
        """Draw the negatives [N, M, C] of each masked frame among the candidates [B, A] of its utterance."""
        wanted, available = torch.stack([masked.sum(1), candidates.sum(1)]).tolist()
        frames = targets[candidates].split(available)
        drawn = [self.sample_negatives(own, number)[0] for own, number in zip(frames, wanted) if number]
        return torch.cat(drawn, dim=1)

    def sample_negatives(self, y, num):
        """Draw ``num_negatives`` of the candidates y [K, C] for each of ``num`` targets.

        Returns:
            negatives [N, num, C] and their indices [num, N]; without replacement if there are enough candidates.
        """
        replacement = len(y) < self.num_negatives
        weights = torch.ones((num, len(y)), device=y.device)
        indices = torch.multinomial(weights, self.num_negatives, replacement=replacement)
        return y[indices].transpose(0, 1), indices

    def _real_frames(self, outputs, lengths: torch.Tensor | None):
        """Return which target frames [B, A] have an output, the offset later; without lengths [B], all outputs are real."""
        index = torch.arange(outputs.shape[1], device=outputs.device) + self.decoder_offset
        real = (index < outputs.shape[1]).expand(outputs.shape[:2])
        return real if lengths is None else real & (index < lengths.to(outputs.device).unsqueeze(1))


def _combine(features, combined: int, frames: int):
    """Join so many feature frames [B, D, T] to each of A target frames: [B, A, F]; zeros stand for what is missing."""
    wanted = frames * combined
    features = F.pad(features, (0, max(wanted - features.shape[2], 0)))[..., :wanted]
    return features.transpose(1, 2).reshape(features.shape[0], frames, -1)


def _without_repetitions(ids):
    """Keep one of each run of equal ids [B, A]; returns them [B, longest], filled with zeros, and lengths [B]."""
    index = F.pad((ids.diff(dim=1) != 0).cumsum(dim=1), (1, 0))
    lengths = index[:, -1] + 1
    kept = torch.zeros_like(ids).scatter(1, index, ids)
    return kept[:, : int(lengths.max())], lengths
