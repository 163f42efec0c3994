# SPDX-License-Identifier: Apache-2.0
"""Models side by side: scores by utterance in each context and part of their objectives, with confidence intervals.

Shapes: U utterances, N loss positions, C classes, H codebooks.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from scipy import stats

from nemo.collections.asr.parts.att_context.context import AttContext, context_label
from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms
from nemo.collections.asr.parts.att_context.windows import Window, tightest_window
from nemo.collections.asr.parts.objectives.base import FrameScores
from nemo.collections.asr.parts.objectives.masked_tokens import MaskedTokens
from nemo.collections.asr.parts.ssl_reports.codebook_use import CodebookUse, token_counts
from nemo.collections.asr.parts.ssl_reports.figures import attention_frame_ms
from nemo.collections.asr.parts.ssl_reports.validation import parse_contexts, passes_in_contexts, tightest_of

MASKED = MaskedTokens.name
NUMBERS_AT_ONCE = 10**7  # of resampled utterances held in memory


class UtteranceScores:
    """Sums over the loss positions of each utterance, in one part of an objective and one context."""

    def __init__(self, classes: int, books: int = 1):
        self._sums, self._digests = [np.zeros((0, 3))], [np.zeros(0, dtype=np.int64)]
        self._counts = torch.zeros(books, classes, dtype=torch.int64)  # of the targets

    def add(self, draws: Sequence[FrameScores], utterances: int) -> None:
        """Add a batch of so many utterances, predicted in several draws of masks or at several horizons."""
        likelihood, correct, index, targets = (torch.cat(part) for part in zip(*draws))
        targets = targets.reshape(-1, self._counts.shape[0])
        columns = torch.stack((likelihood, correct, torch.ones_like(correct)), dim=1).double()
        self._sums.append(columns.new_zeros(utterances, 3).index_add_(0, index, columns).cpu().numpy())
        self._digests.append(_digests(targets, index, utterances))
        self._counts += token_counts(targets, *self._counts.shape).cpu()

    def columns(self) -> np.ndarray:
        """Return negative log-likelihood, correct predictions and loss positions, [3, U] float64."""
        return np.concatenate(self._sums).T

    def digests(self) -> np.ndarray:
        """Return a number for each utterance that stands for its targets and their place in the batch, [U] int64."""
        return np.concatenate(self._digests)

    @property
    def majority_class(self) -> float:
        """The accuracy of the majority-class baseline; the mean over codebooks."""
        return self._shares().amax(dim=1).mean().item()

    @property
    def unigram_entropy(self) -> float:
        """The loss, in nats, of knowing how common each target is and nothing else; the mean over codebooks."""
        return torch.special.entr(self._shares()).sum(dim=1).mean().item()

    def _shares(self) -> torch.Tensor:
        return self._counts.double() / self._counts.sum(dim=1, keepdim=True).clamp(min=1)


def _digests(targets: torch.Tensor, utterances: torch.Tensor, count: int) -> np.ndarray:
    """Return a number for each utterance that stands for its targets [N, H] in their order in the batch."""
    weights = 2 * torch.arange(targets.numel(), device=targets.device).view_as(targets) + 1  # odd: none is lost
    sums = (weights * (targets + 1)).sum(dim=1)
    return sums.new_zeros(count).index_add_(0, utterances, sums).cpu().numpy()


class ModelScores(NamedTuple):
    """What :func:`evaluate` found."""

    parts: dict[str, dict[str, UtteranceScores]]  # by part of the objective and context label; ``next``: all horizons
    codebook: dict[str, float]  # the codebook's use by all targets, whether predicted or not
    tokens: np.ndarray  # a number for each utterance that stands for all its targets, [U] int64


def evaluate(
    model, batches: Iterable, contexts: Sequence, seed: int = 0, window: Window | None = None, draws: int = 1
) -> ModelScores:
    """Predict the tokens of utterances in each context, by every part of the model's objective.

    The model is put into eval mode. Masked tokens are predicted on the same masks in each context, in several draws with
    the seeds from ``seed`` on; next tokens from unmasked input, so that a model of both objectives is comparable with one
    of next tokens alone. The masks are drawn for a window; see ``passes_in_contexts``.

    Raises:
        ValueError: with the reason, if in a context the receptive field leaves no next token.
    """
    model.eval()
    classes, books = model.quantizer.num_classes, model.quantizer.num_books
    use, labels = CodebookUse(classes, books, batches_covered=2**62, blocks=1), [*map(context_label, contexts)]
    parts = [part for objective in model.objectives for part in (*objective.parts, objective.name)]
    scores = {part: {label: UtteranceScores(classes, books) for label in labels} for part in parts}
    tokens = []
    with torch.inference_mode():
        for batch in batches:
            batch = model.transfer_batch_to_device(batch, model.device, 0)
            inputs, found = model.inputs_of(batch), {}
            for objective in model.objectives:
                for drawn in range(seed, seed + draws) if objective.masks else (seed,):
                    passes = passes_in_contexts(model, batch, contexts, drawn, window, objective.masks, inputs)
                    for context, record in passes:
                        label = context_label(context)
                        for part, scored in objective.scores(record).items():
                            for name in {part, objective.name}:
                                found.setdefault((name, label), []).append(scored)
            targets, lengths = inputs.targets
            for (part, label), scored in found.items():
                scores[part][label].add(scored, len(lengths))
            use.update(targets, lengths)
            valid = torch.arange(targets.shape[1], device=targets.device) < lengths.to(targets.device).unsqueeze(1)
            tokens.append(_digests(targets[valid].view(-1, books), valid.nonzero()[:, 0], len(lengths)))
    codebook = {name: value.item() for name, value in use.statistics()._asdict().items()}
    return ModelScores(scores, {**codebook, 'classes': classes}, np.concatenate(tokens))


def ratio_of_sums(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int, confidence: float, seed: int
) -> tuple[float, float, float]:
    """Return a mean per frame, from a sum and a number of frames of each utterance [U], and the bounds of its interval.

    The interval is a percentile bootstrap over utterances, each with all its frames: frames of an utterance are alike,
    so an interval over frames would be too narrow. NaN for fewer than two utterances.
    """
    with np.errstate(invalid='ignore', divide='ignore'):
        value = float(np.divide(numerator.sum(), denominator.sum()))
        if len(numerator) < 2:
            return value, float('nan'), float('nan')
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
    return value, float(interval.low), float(interval.high)


def why_not_compared(scores: ModelScores, reference: ModelScores, part: str, label: str) -> str | None:
    """Return why the losses of two models cannot be compared in a part and a context, in words; None: they can.

    They can where both predict the same tokens, in the same frames of the same utterances. The words call the models "it"
    and "the first".
    """
    for who, model in (('it', scores), ('the first', reference)):
        if part not in model.parts:
            return f'{who} has no such part'
    if label not in reference.parts[part]:
        return 'the first was not run in this context'
    if not np.array_equal(scores.tokens, reference.tokens):
        return "its targets are other tokens than the first's: they come from another quantizer or other features"
    one, other = scores.parts[part][label], reference.parts[part][label]
    if np.array_equal(one.columns()[2], other.columns()[2]) and np.array_equal(one.digests(), other.digests()):
        return None
    if part == MASKED:
        return 'other frames are masked for it: its masking has other settings'
    return "its horizons are others, or begin at another token, for its look-ahead is another"


def contexts_of(model, wanted, name: str) -> list:
    """Return the contexts to evaluate a model in.

    Raises:
        ValueError: naming the model and the context, if it predicts no tokens, or cannot be evaluated in the context.
    """
    if not hasattr(model, 'objectives'):
        raise ValueError(f'{name}: {type(model).__name__} predicts neither masked nor next tokens')
    try:
        contexts = parse_contexts(wanted, model.encoder, '--contexts')
        for context in contexts:
            with model.encoder.using_att_context_size(context):
                model.objectives.offset()  # raises where an output depends on the whole utterance
        return contexts
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error


def loader_of(model, manifest: str, batch_size: int, num_workers: int = 0):
    """Return the model's own data loader of a manifest: every utterance once, in its order."""
    settings = dict(manifest_filepath=manifest, batch_size=batch_size, num_workers=num_workers, shuffle=False)
    rate = model.preprocessor.featurizer.sample_rate
    return model._setup_dataloader_from_config(OmegaConf.create({**settings, 'sample_rate': rate, 'labels': []}))


def compare_models(
    models: Mapping,
    contexts: Mapping,
    batches: Mapping[str, Iterable],
    mask_context: int | None = None,
    draws: int = 1,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> list[dict]:
    """Evaluate models side by side.

    Args:
        models: by name, in order; the others are compared with the first.
        contexts: of each model.
        batches: the same utterances as batches of each model's loader.
        mask_context: left context that masks are drawn for; None: the tightest of all models and contexts.
        draws: how often each utterance is masked.
        seed: of masks and bootstrap.
        resamples: of the bootstrap.
        confidence: of the intervals.

    Returns:
        for each model ``model``, ``objective``, ``mask_context`` (None: it masks nothing), ``codebook`` and ``contexts``,
        a row for each context and part of the objective, with the bounds of intervals under ``NAME_interval``.
        ``below_unigram`` is how many nats the loss is below the unigram entropy, ``loss_difference`` how many it is above
        the first model's; None for the first model, or with the reason in ``not_compared``.
    """
    window = masking_window(models, contexts, mask_context)
    results, first, sampling = [], None, (resamples, confidence, seed)
    for name, model in models.items():
        scores = evaluate(model, batches[name], contexts[name], seed, window, draws)
        first = scores if first is None else first
        rows, frame_ms = [], attention_frame_ms(model)
        for context in contexts[name]:
            look_ahead = {'look_ahead_ms': look_ahead_ms(model.encoder, context, frame_ms)}
            rows += [_row(scores, first, context, part, sampling) | look_ahead for part in scores.parts]
        masked_for = window.context.left if model.objectives.masks else None
        result = dict(model=name, objective=model.objective, mask_context=masked_for, codebook=scores.codebook)
        results.append({**result, 'contexts': rows})
    return results


def masking_window(models: Mapping, contexts: Mapping, left: int | None) -> Window | None:
    """Return the window that masks are drawn for: of a left context, or of all layers, models and contexts that mask."""
    masking = [name for name, model in models.items() if model.objectives.masks]
    if left is not None and masking:
        return Window(AttContext(left, 0))
    return tightest_window(tightest_of(models[name].encoder, contexts[name]) for name in masking) if masking else None


def _row(scores: ModelScores, first: ModelScores, context: Sequence, part: str, sampling: tuple) -> dict:
    label = context_label(context)
    sums = scores.parts[part][label]
    lost, correct, frames = sums.columns()
    estimates = {'loss': ratio_of_sums(lost, frames, *sampling), 'accuracy': ratio_of_sums(correct, frames, *sampling)}
    estimates['perplexity'] = tuple(np.exp(estimates['loss']).tolist())
    reason = None if scores is first else why_not_compared(scores, first, part, label)
    if scores is not first and reason is None:
        difference = lost - first.parts[part][label].columns()[0]
        estimates['loss_difference'] = ratio_of_sums(difference, frames, *sampling)
    row = {'context': list(context), 'part': part, 'loss_difference': None, 'loss_difference_interval': None}
    for name, (value, low, high) in estimates.items():
        row.update({name: value, f'{name}_interval': [low, high]})
    row.update(majority_class=sums.majority_class, unigram_entropy=sums.unigram_entropy)
    row.update(below_unigram=sums.unigram_entropy - row['loss'], frames=int(frames.sum()), utterances=len(frames))
    return {**row, 'not_compared': reason}


def reasons_of(result: Mapping) -> list[str]:
    """Return, as text, in which parts and contexts a model cannot be compared with the first, and why."""
    where: dict[tuple, list] = {}
    for row in result['contexts']:
        if row['not_compared'] is not None:
            where.setdefault((row['part'], row['not_compared']), []).append(str(row['context']))
    return [f"{part} in {', '.join(contexts)}: {reason}" for (part, reason), contexts in where.items()]
