# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Per utterance, what a model knows of masked speech in each context, and how sure that is.

Shapes: U utterances.
"""

from dataclasses import dataclass
from typing import Iterable, Optional, Sequence

import numpy as np
import torch
from scipy import stats

from nemo.collections.asr.parts.att_context.context import context_label
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.ssl_reports.codebook_use import CodebookUse
from nemo.collections.asr.parts.ssl_reports.validation import FrameScores, predictions_in_contexts, signal_of

NUMBERS_AT_ONCE = 10**7  # of resampled utterances held in memory


class UtteranceScores:
    """Sums over the masked frames of each utterance, in one context."""

    def __init__(self):
        self._sums: list[np.ndarray] = []

    def add(self, draws: Sequence[FrameScores], utterances: int) -> None:
        """Add a batch of so many utterances, masked and predicted in several draws."""
        likelihood, correct, index = (torch.cat(part) for part in zip(*draws))
        columns = torch.stack((likelihood, correct, torch.ones_like(correct)), dim=1).double()
        sums = columns.new_zeros(utterances, columns.shape[1]).index_add_(0, index, columns)
        self._sums.append(sums.cpu().numpy())

    def columns(self) -> np.ndarray:
        """Return negative log-likelihood, correct predictions and masked frames, [3, U] float64."""
        return np.concatenate(self._sums).T if self._sums else np.zeros((3, 0))


@dataclass
class ModelScores:
    """What :func:`evaluate` found."""

    contexts: dict[str, UtteranceScores]
    """By the context's label."""
    commonest: float
    """The accuracy of always guessing the commonest token of the masked frames; the mean over codebooks."""
    codebook: dict[str, float]
    """The codebook's use by all targets, masked or not."""


def evaluate(
    model, batches: Iterable, contexts: Sequence, seed: int = 0, window: Optional[Window] = None, draws: int = 1
) -> ModelScores:
    """Predict the masked tokens of utterances in each context, on the same masks.

    The model is put into eval mode. Masks depend on the seed, on each utterance, on the masking's configuration and on
    ``window`` only: batches may be cut in any way.

    Args:
        model: an ``EncDecMaskedTokenPredModel``.
        batches: of its own data loader, on any device.
        contexts: that its encoder can follow.
        seed: of the masks.
        window: that the masks are drawn for; see ``predictions_in_contexts``.
        draws: how often each utterance is masked, with the seeds from ``seed`` on: for more masked frames.
    """
    model.eval()
    classes, books = model.quantizer.num_classes, model.quantizer.num_books
    scores = {context_label(context): UtteranceScores() for context in contexts}
    use = CodebookUse(classes, books, batches_covered=2**62, blocks=1)
    guesses = torch.zeros(books, classes, dtype=torch.int64)
    with torch.inference_mode():
        for batch in batches:
            batch = model.transfer_batch_to_device(batch, model.device, 0)
            utterances = signal_of(batch)[0].shape[0]
            found = {label: [] for label in scores}
            for draw in range(draws):
                drawn = predictions_in_contexts(model, batch, contexts, seed + draw, window)
                for context, predictions, record in drawn:
                    found[context_label(context)].append(FrameScores.of(predictions, model.loss))
                guesses += _counts(predictions.targets, books, classes).cpu()  # the same in every context
            use.update(record.tokens, record.token_lengths)
            for label, scored in found.items():
                scores[label].add(scored, utterances)
    commonest = (guesses.amax(dim=1) / guesses.sum(dim=1).clamp(min=1)).mean().item()
    codebook = {name: value.item() for name, value in use.statistics()._asdict().items()}
    return ModelScores(scores, commonest, {**codebook, 'classes': classes})


def _counts(targets: torch.Tensor, books: int, classes: int) -> torch.Tensor:
    """Return how often each token of each codebook comes in targets [N] or [N, H]; [H, C]."""
    offsets = torch.arange(books, device=targets.device) * classes
    counts = torch.bincount((targets.view(-1, books) + offsets).flatten(), minlength=books * classes)
    return counts.view(books, classes)


@dataclass(frozen=True)
class Estimate:
    """A value, and the bounds of its confidence interval; NaN for the bounds of fewer than two utterances."""

    value: float
    low: float
    high: float

    def map(self, function) -> 'Estimate':
        """Return the estimate of an increasing function of the value."""
        return Estimate(*(float(function(number)) for number in (self.value, self.low, self.high)))


def ratio_of_sums(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int, confidence: float, seed: int
) -> Estimate:
    """Estimate a mean per frame, with a percentile bootstrap interval over utterances.

    Utterances are drawn with replacement, each with all its frames: frames of an utterance are alike, so an interval
    over frames would be too narrow.

    Args:
        numerator, denominator: a sum over frames and their number, for each utterance [U].
        resamples: bootstrap samples.
        confidence: of the interval, between 0 and 1.
        seed: of a generator of its own.
    """
    with np.errstate(invalid='ignore', divide='ignore'):
        value = float(np.divide(numerator.sum(), denominator.sum()))
        if len(numerator) < 2:
            return Estimate(value, float('nan'), float('nan'))
        interval = stats.bootstrap(
            (numerator, denominator),
            lambda above, below, axis=-1: above.sum(axis=axis) / below.sum(axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(NUMBERS_AT_ONCE // len(numerator), 1),
            confidence_level=confidence,
            method='percentile',
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def summarize(scores: UtteranceScores, resamples: int, confidence: float, seed: int) -> dict[str, Estimate]:
    """Return loss (nats per masked frame), accuracy and perplexity with their intervals."""
    likelihood, correct, frames = scores.columns()
    loss = ratio_of_sums(likelihood, frames, resamples, confidence, seed)
    accuracy = ratio_of_sums(correct, frames, resamples, confidence, seed)
    return {'loss': loss, 'accuracy': accuracy, 'perplexity': loss.map(np.exp)}


def loss_difference(
    scores: UtteranceScores, reference: UtteranceScores, resamples: int, confidence: float, seed: int
) -> Optional[Estimate]:
    """Return by how much the loss is above the reference's, utterance against utterance.

    None where the two did not predict the same numbers of frames of the same utterances: where nothing is paired.
    """
    (likelihood, _, frames), (other, _, other_frames) = scores.columns(), reference.columns()
    if not np.array_equal(frames, other_frames):
        return None
    return ratio_of_sums(likelihood - other, frames, resamples, confidence, seed)
