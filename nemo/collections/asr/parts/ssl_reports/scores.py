# SPDX-License-Identifier: Apache-2.0
"""How well frames were predicted, part by part of a model's objective. New in this project.

A part is ``masked``, the masked tokens, or a horizon: ``next_0``, the first next token of each frame, and so on.

Shapes: N frames that count, C classes, H codebooks.
"""

from typing import NamedTuple

import torch

from nemo.collections.asr.losses.ssl_losses.mlm import IGNORED_TARGET
from nemo.collections.asr.parts.ssl_reports.batch_record import BatchRecord
from nemo.collections.asr.parts.utils.masked_frames import MaskedPredictions
from nemo.collections.asr.parts.utils.next_token_frames import predictions_of_horizons

MASKED, NEXT = 'masked', 'next_'  # names of parts; a horizon's number follows the second
NEXT_OF_ALL = 'next'  # of all horizons together


class FrameScores(NamedTuple):
    """How well the frames that count were predicted; over several codebooks the mean."""

    negative_log_likelihood: torch.Tensor  # [N] float32
    correct: torch.Tensor  # [N] float32: the share of the codebooks' tokens that were the likeliest
    utterances: torch.Tensor  # [N] int64: index in the batch
    targets: torch.Tensor  # [N] or [N, H] int64

    @classmethod
    def of(cls, predictions: MaskedPredictions, loss) -> 'FrameScores':
        """Score predictions of frames that all count, by the loss of their model; there may be none."""
        log_probs, targets, utterances = predictions
        correct = (log_probs.argmax(dim=1) == targets).float()
        correct = correct.mean(dim=1) if targets.dim() == 2 else correct
        return cls(loss.of_frames(log_probs, targets, reduction='none'), correct, utterances, targets)


def parts_of(model) -> list[str]:
    """Return the names of the parts of a model's objective."""
    masked = [MASKED] if model.predicts_masked_tokens else []
    return masked + [f'{NEXT}{horizon}' for horizon in range(len(model.next_token_decoders or ()))]


def scores_of(model, record: BatchRecord) -> dict[str, FrameScores]:
    """Score a forward pass, within its context, in every part of the model's objective; waits for the device."""
    masked = {}
    if model.predicts_masked_tokens:
        masked[MASKED] = FrameScores.of(without_placeholder(model.predictions_of(record)), model.loss)
    return {**masked, **(next_token_scores_of(model, record) if model.predicts_next_tokens else {})}


def next_token_scores_of(model, record: BatchRecord) -> dict[str, FrameScores]:
    """Score a forward pass of a model that predicts next tokens at each horizon; waits for the device."""
    horizons = predictions_of_horizons(model.next_token_decoders, model.next_token_frames(record))
    frame_loss = model.next_token_loss.frame_loss
    return {f'{NEXT}{horizon}': FrameScores.of(scored, frame_loss) for horizon, scored in enumerate(horizons)}


def without_placeholder(predictions: MaskedPredictions) -> MaskedPredictions:
    """Leave the frame out that stands for none; N may then be 0."""
    if predictions.targets.shape[0] > 1:
        return predictions
    counted = (predictions.targets != IGNORED_TARGET).flatten()[:1]
    return MaskedPredictions(*(part[counted] for part in predictions))
