# SPDX-License-Identifier: Apache-2.0
"""An objective: the loss of a forward pass, the scores of its predictions, and checks before training.

Shapes: B batch, D features, T feature frames, A attention frames, M mask frames (T or A, by mask position), S target
frames, N loss positions, C classes, H codebooks, K horizons.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nemo.collections.asr.losses.ssl_losses.mlm import IGNORED_TARGET, has_target

Frames = tuple[torch.Tensor, torch.Tensor]
Logs = dict[str, float | torch.Tensor]


@dataclass
class BatchInputs:
    """A batch's features, and its targets once one pass has made them, for passes in several contexts."""

    clean: Frames  # features [B, D, T] and lengths [B] that the targets come from
    seen: Frames  # those that are masked and encoded; the same object where there is no noise
    targets: Frames | None = None  # tokens [B, S] or [B, S, H] and their lengths [B]


class BatchRecord(NamedTuple):
    """One forward pass of a model, for losses and reports; lengths are [B]."""

    encoded: torch.Tensor | None  # [B, d_model, A]; None in a record that is kept, for it would keep the graph alive
    encoded_lengths: torch.Tensor
    masks: torch.Tensor  # [B, D, M], 1 where masked
    mask_lengths: torch.Tensor
    tokens: torch.Tensor  # the targets, [B, S] or [B, S, H]
    token_lengths: torch.Tensor
    features: torch.Tensor  # the clean ones, [B, D, T]
    feature_lengths: torch.Tensor
    factor: int  # mask frames per attention frame
    threshold: float  # share of an attention frame's mask frames above which it counts as masked
    decoder_offset: int  # leading decoder frames that the loss of masked tokens drops


class LossPositions(NamedTuple):
    """The frames of a batch in the loss; if there is none, one frame with targets of -100."""

    outputs: torch.Tensor  # encoder frames [N, d_model], or log-probabilities [N, C] or [N, C, H]
    targets: torch.Tensor  # [N] or [N, H] int64; of several horizons [N, K] or [N, K, H]
    utterances: torch.Tensor  # [N] int64: index of each frame's utterance in the batch, rising

    def having_targets(self) -> 'LossPositions':
        """Return the positions with a target; synchronises host and device."""
        index = has_target(self.targets).nonzero().squeeze(1)
        return LossPositions(*(part.index_select(0, index) for part in self))

    def decoded(self, decoder: torch.nn.Module) -> 'LossPositions':
        """Return the positions with the log-probabilities of their encoder frames."""
        return self._replace(outputs=decoder(encoder_output=self.outputs.t().unsqueeze(0)).squeeze(0))


class FrameScores(NamedTuple):
    """How well frames were predicted; over several codebooks the mean."""

    negative_log_likelihood: torch.Tensor  # [N] float32
    correct: torch.Tensor  # [N] float32: the share of the codebooks' tokens that were the likeliest
    utterances: torch.Tensor  # [N] int64: index in the batch
    targets: torch.Tensor  # [N] or [N, H] int64

    @classmethod
    def of(cls, predictions: LossPositions, loss: Any) -> 'FrameScores':
        """Score log-probabilities by the loss of their model; N is 0 where there is no target."""
        if len(predictions.targets) == 1:
            predictions = predictions.having_targets()
        log_probs, targets, utterances = predictions
        correct = (log_probs.argmax(dim=1) == targets).float()
        correct = correct.mean(dim=1) if targets.dim() == 2 else correct
        return cls(loss.of_frames(log_probs, targets, reduction='none'), correct, utterances, targets)


class Objective:
    """What a model (an ``EncDecMaskedTokenPredModel``, whose decoders and losses are used) predicts."""

    name: str  # in the names of what is logged, where there are several objectives
    masks = False  # whether the encoder's input is masked
    parts: tuple[str, ...] = ()  # of its scores; none: they are filed under the name of the objective
    frame_losses: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """Of the last loss, without gradient: each position's loss [N], its predicted tokens [N], and its utterance [N]."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def decoder(self) -> torch.nn.Module:
        """The decoder that ``model.forward`` runs."""
        return self.model.decoder

    def loss(self, record: BatchRecord) -> tuple[torch.Tensor, Logs]:
        """Return the loss of a pass, a scalar, and the loss of each part, without gradient."""
        raise NotImplementedError

    def scores(self, record: BatchRecord) -> dict[str, FrameScores]:
        """Score the predictions of a pass, part by part; synchronises host and device."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ValueError before training, naming the config key, its value and what is allowed."""

    def mean_over_tokens(
        self, losses: torch.Tensor, predicted: torch.Tensor, utterances: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of a pass from its positions' losses, predicted tokens and utterances, [N] each.

        In training with ``model.loss_over: global`` the mean of the ranks' losses is that over all their tokens.
        """
        self.frame_losses = losses.detach(), predicted, utterances
        count, ranks, model = predicted.sum(), torch.distributed, self.model
        loss = losses.sum() / count.clamp(min=1)
        of_all_ranks = model.training and model.cfg.get('loss_over') == 'global'
        if not (of_all_ranks and ranks.is_available() and ranks.is_initialized()):
            return loss
        total = count.float()  # a copy
        ranks.all_reduce(total)
        return loss * (count * ranks.get_world_size() / total.clamp(min=1))


def gather_loss_positions(frames: torch.Tensor, targets: torch.Tensor, loss_mask: torch.Tensor) -> LossPositions:
    """Return the loss positions, where a mask [B, A] is True, of frames and targets [B, A, ...].

    Synchronises host and device: their number is a size. Kernels and their backward passes need one, so where there is
    none it is the first frame, with targets of -100.
    """
    index = loss_mask.flatten().nonzero().squeeze(1)
    if index.shape[0] == 0:
        index = index.new_zeros(1)
        targets = torch.full_like(targets, IGNORED_TARGET)
    # index_select's backward adds rows up; that of an index by two tensors sorts them first.
    utterances = index.div(loss_mask.shape[1], rounding_mode='floor')
    frames, targets = (part.flatten(0, 1).index_select(0, index) for part in (frames, targets))
    return LossPositions(frames, targets, utterances)
