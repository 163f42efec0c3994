# SPDX-License-Identifier: Apache-2.0
"""Scores of a model by utterance, in each context and part of its objectives, with confidence intervals.

Shapes: U utterances, N loss positions, S target frames, C classes, H codebooks.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from nemo.collections.asr.parts.att_context.context import context_label
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.objectives.base import FrameScores
from nemo.collections.asr.parts.objectives.masked_tokens import MaskedTokens
from nemo.collections.asr.parts.objectives.next_tokens import NextTokens
from nemo.collections.asr.parts.ssl_reports.codebook_use import CodebookUse
from nemo.collections.asr.parts.ssl_reports.validation import passes_in_contexts, signal_of

MASKED, NEXT_OF_ALL = MaskedTokens.name, NextTokens.name  # names of parts
NUMBERS_AT_ONCE = 10**7  # of resampled utterances held in memory


class UtteranceScores:
    """Sums over the frames of each utterance that count, in one part of an objective and one context.

    Args:
        classes: C.
        books: H.
    """

    def __init__(self, classes: int, books: int = 1):
        self._sums: list[np.ndarray] = []
        self._digests: list[np.ndarray] = []
        self._counts = torch.zeros(books, classes, dtype=torch.int64)  # of the targets

    def add(self, draws: Sequence[FrameScores], utterances: int) -> None:
        """Add a batch of so many utterances, predicted in several draws of masks or at several horizons."""
        likelihood, correct, index, targets = (torch.cat(part) for part in zip(*draws))
        columns = torch.stack((likelihood, correct, torch.ones_like(correct)), dim=1).double()
        sums = columns.new_zeros(utterances, columns.shape[1]).index_add_(0, index, columns)
        self._sums.append(sums.cpu().numpy())
        self._counts += _counts(targets, *self._counts.shape).cpu()
        self._digests.append(_digests(draws, utterances))

    def columns(self) -> np.ndarray:
        """Return negative log-likelihood, correct predictions and loss positions, [3, U] float64."""
        return np.concatenate(self._sums).T if self._sums else np.zeros((3, 0))

    def digests(self) -> np.ndarray:
        """Return a number for each utterance that stands for its targets in their order, [U] int64."""
        return np.concatenate(self._digests) if self._digests else np.zeros(0, dtype=np.int64)

    @property
    def majority_class(self) -> float:
        """The accuracy of the majority-class baseline; the mean over codebooks."""
        return (self._counts.amax(dim=1) / self._counts.sum(dim=1).clamp(min=1)).mean().item()

    @property
    def unigram_entropy(self) -> float:
        """The loss, in nats, of knowing how common each target is and nothing else; the mean over codebooks."""
        shares = self._counts.double() / self._counts.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.special.entr(shares).sum(dim=1).mean().item()


@dataclass
class ModelScores:
    """What :func:`evaluate` found."""

    parts: dict[str, dict[str, UtteranceScores]]
    """By part of the objective, and by the context's label; a part ``next`` sums up over all horizons."""
    codebook: dict[str, float]
    """The codebook's use by all targets, whether predicted or not."""
    tokens: np.ndarray
    """A number for each utterance that stands for all its targets, [U] int64."""
    offsets: dict[str, int]
    """How many tokens after its own a frame predicts first, by context; empty without next tokens."""

    @property
    def contexts(self) -> dict[str, UtteranceScores]:
        """The masked tokens, by the context's label.

        Raises:
            KeyError: if the objective has none.
        """
        return self.parts[MASKED]


def evaluate(
    model, batches: Iterable, contexts: Sequence, seed: int = 0, window: Window | None = None, draws: int = 1
) -> ModelScores:
    """Predict the tokens of utterances in each context, by every part of the model's objective.

    The model is put into eval mode. Masked tokens are predicted on the same masks in each context. Masks depend on the
    seed, on each utterance, on the masking's configuration and on ``window`` only: batches may be cut in any way. Next
    tokens are predicted from unmasked input, so that a model of both objectives is comparable with one
    of next tokens alone.

    Args:
        model: an ``EncDecMaskedTokenPredModel``.
        batches: of its own data loader, on any device.
        contexts: that its encoder can follow.
        seed: of the masks.
        window: that the masks are drawn for; see ``passes_in_contexts``.
        draws: how often each utterance is masked, with the seeds from ``seed`` on: for more masked frames.

    Raises:
        ValueError: with the reason, if in a context the receptive field leaves no next token.
    """
    model.eval()
    classes, books = model.quantizer.num_classes, model.quantizer.num_books
    use = CodebookUse(classes, books, batches_covered=2**62, blocks=1)
    labels = [context_label(context) for context in contexts]
    parts = [part for objective in model.objectives for part in (*objective.parts, objective.name)]
    scores = {part: {label: UtteranceScores(classes, books) for label in labels} for part in parts}
    tokens, offsets = [], {}
    with torch.inference_mode():
        for batch in batches:
            batch = model.transfer_batch_to_device(batch, model.device, 0)
            found: dict[tuple[str, str], list[FrameScores]] = {}
            inputs = model.inputs_of(batch)
            for objective in model.objectives:
                for drawn in range(seed, seed + draws) if objective.masks else (seed,):
                    passes = passes_in_contexts(model, batch, contexts, drawn, window, objective.masks, inputs)
                    for context, record in passes:
                        offset, label = objective.offset(), context_label(context)
                        offsets.update({} if offset is None else {label: offset})
                        for part, scored in objective.scores(record).items():
                            for name in dict.fromkeys((part, objective.name)):
                                found.setdefault((name, label), []).append(scored)
            for (part, label), scored in found.items():
                scores[part][label].add(scored, signal_of(batch)[0].shape[0])
            use.update(*inputs.targets)
            rows, lengths = inputs.targets
            tokens += [_digest(row[:length]) for row, length in zip(rows, lengths.tolist(), strict=True)]
    codebook = {name: value.item() for name, value in use.statistics()._asdict().items()}
    return ModelScores(scores, {**codebook, 'classes': classes}, np.array(tokens, dtype=np.int64), offsets)


def _counts(targets: torch.Tensor, books: int, classes: int) -> torch.Tensor:
    """Return how often each token of each codebook comes in targets [N] or [N, H]; [H, C]."""
    offsets = torch.arange(books, device=targets.device) * classes
    counts = torch.bincount((targets.view(-1, books) + offsets).flatten(), minlength=books * classes)
    return counts.view(books, classes)


def _digest(targets: torch.Tensor, before: int = 0) -> int:
    """Return a number that stands for targets [N] or [N, H] in their order, after those of another number."""
    return zlib.crc32(targets.cpu().contiguous().numpy().tobytes(), before)


def _digests(draws: Sequence[FrameScores], utterances: int) -> np.ndarray:
    """Return such a number for each utterance, through all draws, [U] int64."""
    digests = np.zeros(utterances, dtype=np.int64)
    for draw in draws:
        targets, index = draw.targets.cpu(), draw.utterances.cpu()
        for utterance in range(utterances):
            digests[utterance] = _digest(targets[index == utterance], int(digests[utterance]))
    return digests


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
    """Return loss (nats per frame that counts), accuracy and perplexity with their intervals."""
    likelihood, correct, frames = scores.columns()
    loss = ratio_of_sums(likelihood, frames, resamples, confidence, seed)
    accuracy = ratio_of_sums(correct, frames, resamples, confidence, seed)
    return {'loss': loss, 'accuracy': accuracy, 'perplexity': loss.map(np.exp)}


def why_not_compared(scores: ModelScores, reference: ModelScores, part: str, label: str) -> str | None:
    """Return why the losses of two models cannot be compared in a part and a context, in words; None: they can.

    They can where both predict the same tokens, in the same frames of the same utterances.

    Args:
        scores: of the model that the words call "it".
        reference: of the model that they call "the first".
        part: of the objective of either.
        label: of a context of ``scores``.
    """
    for who, model in (('it', scores), ('the first', reference)):
        if part not in model.parts:
            return f'{who} has no such part'
    if label not in reference.parts[part]:
        return 'the first was not run in this context'
    if not np.array_equal(scores.tokens, reference.tokens):
        return "its targets are other tokens than the first's: they come from another quantizer or other features"
    pair = scores.parts[part][label], reference.parts[part][label]
    frames = (one.columns()[2] for one in pair)
    if np.array_equal(*frames) and np.array_equal(*(one.digests() for one in pair)):
        return None
    return _why_other_frames(scores, reference, part, label)


def _why_other_frames(scores: ModelScores, reference: ModelScores, part: str, label: str) -> str:
    """Return why two models that have the same tokens do not predict the same ones."""
    if part == MASKED:
        return 'other frames are masked for it: its masking has other settings'
    offsets = scores.offsets[label], reference.offsets[label]
    if offsets[0] != offsets[1]:
        return "its horizons begin {} tokens after a frame's own, the first's {}".format(*offsets)
    horizons = [len(model.parts.keys() - {MASKED, NEXT_OF_ALL}) for model in (scores, reference)]
    if part == NEXT_OF_ALL and horizons[0] != horizons[1]:
        return 'it has {} horizons, the first {}'.format(*horizons)
    return "its utterances have other numbers of frames than the first's"


def loss_difference(
    scores: UtteranceScores, reference: UtteranceScores, resamples: int, confidence: float, seed: int
) -> Estimate:
    """Return by how much the loss is above the reference's, utterance against utterance.

    Args:
        scores, reference: of the same frames, see :func:`why_not_compared`.
        resamples, confidence, seed: as in :func:`ratio_of_sums`.
    """
    (likelihood, _, frames), (other, _, _) = scores.columns(), reference.columns()
    return ratio_of_sums(likelihood - other, frames, resamples, confidence, seed)
