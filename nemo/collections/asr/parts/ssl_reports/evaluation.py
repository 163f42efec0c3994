# SPDX-License-Identifier: Apache-2.0
"""Scores of several models by utterance, context and part of the objective, with confidence intervals.

Shapes: U utterances, N loss positions, C classes, H codebooks.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf

from nemo.collections.asr.parts.att_context.context import AttContext, context_label
from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms
from nemo.collections.asr.parts.att_context.windows import Window, tightest_window
from nemo.collections.asr.parts.objectives.base import FrameScores
from nemo.collections.asr.parts.ssl_reports.codebook_use import CodebookUse, statistics_of, token_counts
from nemo.collections.asr.parts.ssl_reports.figures import attention_frame_ms
from nemo.collections.asr.parts.ssl_reports.validation import parse_contexts, passes_in_contexts, tightest_of


class UtteranceScores:
    """Sums over the loss positions of each utterance, in one part of an objective and one context."""

    def __init__(self, classes: int, books: int = 1):
        self._sums = [np.zeros((0, 3))]
        self.target_counts = torch.zeros(books, classes, dtype=torch.int64)
        self.digest = 0  # stands for all targets and the utterances that they are of

    def add(self, scores: Sequence[FrameScores], utterances: int) -> None:
        """Add a batch of so many utterances, predicted at one horizon or several."""
        likelihood, correct, index, targets = (torch.cat(part) for part in zip(*scores))
        targets = targets.reshape(-1, len(self.target_counts))
        columns = torch.stack((likelihood, correct, torch.ones_like(correct)), dim=1).double()
        self._sums.append(columns.new_zeros(utterances, 3).index_add_(0, index, columns).cpu().numpy())
        self.target_counts += token_counts(targets, *self.target_counts.shape).cpu()
        for tensor in (index, targets):
            self.digest = zlib.crc32(tensor.cpu().numpy().tobytes(), self.digest)

    def columns(self) -> np.ndarray:
        """Return negative log-likelihood, correct predictions and loss positions, [3, U] float64."""
        return np.concatenate(self._sums).T

    def baselines(self) -> dict[str, float]:
        """Return accuracy of the majority class and loss, in nats, of the unigrams; means over codebooks."""
        shares = self.target_counts.double() / self.target_counts.sum(dim=1, keepdim=True).clamp(min=1)
        entropy = torch.special.entr(shares).sum(dim=1).mean().item()
        return {'majority_class': shares.amax(dim=1).mean().item(), 'unigram_entropy': entropy}


class ModelScores(NamedTuple):
    """What :func:`evaluate` found."""

    parts: dict[str, dict[str, UtteranceScores]]  # by part of the objective and context label; ``next``: all horizons
    codebook: dict[str, float]  # the codebook's use by all targets, whether predicted or not; differs if they do


def evaluate(model, batches: Iterable, contexts: Sequence, seed: int = 0, window: Window | None = None) -> ModelScores:
    """Predict the tokens of utterances in each context, by every part of the model's objective.

    The model is put into eval mode. Masked tokens are predicted on the same masks in each context, see
    ``passes_in_contexts``; next tokens from unmasked input, so that a model of both objectives is comparable with one of
    next tokens alone.

    Raises:
        ValueError: with the reason, if in a context the receptive field leaves no next token.
    """
    model.eval()
    classes, books = model.quantizer.num_classes, model.quantizer.num_books
    parts = [part for objective in model.objectives for part in (*objective.parts, objective.name)]
    labels = [context_label(context) for context in contexts]
    scores = {part: {label: UtteranceScores(classes, books) for label in labels} for part in parts}
    use = CodebookUse(classes, books, batches_per_block=math.inf)
    with torch.inference_mode():
        for batch in batches:
            batch = model.transfer_batch_to_device(batch, model.device, 0)
            inputs, found = model.inputs_of(batch), defaultdict(list)
            for objective in model.objectives:
                passes = passes_in_contexts(model, batch, contexts, seed, window, objective.masks, inputs)
                for context, record in passes:
                    for part, scored in objective.scores(record).items():
                        for name in {part, objective.name}:
                            found[name, context_label(context)].append(scored)
            use.update(*inputs.targets)
            for (part, label), scored in found.items():
                scores[part][label].add(scored, len(inputs.targets[0]))
    codebook = {name: value.item() for name, value in statistics_of(use.counts).items()}
    return ModelScores(scores, {**codebook, 'classes': classes})


def ratio_of_sums(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int, confidence: float, seed: int
) -> tuple[float, float, float]:
    """Return a mean per frame with its interval, from sums and numbers of frames by utterance [U].

    The interval is a percentile bootstrap over utterances, each with all its frames: frames of an utterance are alike,
    so an interval over frames would be too narrow. NaN for fewer than two utterances.
    """
    sums, generator = np.stack((numerator, denominator)), np.random.default_rng(seed)
    count, tail = len(numerator), (1 - confidence) / 2
    with np.errstate(invalid='ignore', divide='ignore'):
        value = np.divide(*sums.sum(axis=1))
        if count < 2:
            return float(value), math.nan, math.nan
        drawn = [np.divide(*sums[:, generator.integers(count, size=count)].sum(axis=1)) for _ in range(resamples)]
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return float(value), float(low), float(high)


def why_not_compared(scores: ModelScores, first: ModelScores, part: str, label: str) -> str | None:
    """Return why a model's losses cannot be compared with the first's in a part and a context.

    None: both predict the same tokens, in the same frames of the same utterances.
    """
    if label not in first.parts.get(part, {}):
        return 'the first has no such part, or was not run in this context'
    if scores.codebook != first.codebook:
        return "its targets are other tokens than the first's: they come from another quantizer or other features"
    if scores.parts[part][label].digest != first.parts[part][label].digest:
        return "other frames or tokens are predicted: its masking, horizons or look-ahead are others than the first's"
    return None


def contexts_of(model, wanted, name: str) -> list:
    """Return the contexts to evaluate a model in; ValueError names model and context if that fails."""
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
    models: Mapping[str, Any],
    contexts: Mapping[str, Sequence],
    batches: Mapping[str, Iterable],
    mask_context: int | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> list[dict]:
    """Evaluate models by name side by side, each in its contexts on batches of the same utterances.

    Args:
        mask_context: left context that masks are drawn for; None: the tightest of all models and contexts.
        seed: of masks and bootstrap; ``resamples`` and ``confidence`` are the bootstrap's.

    Returns:
        for each model ``model``, ``objective``, ``mask_context`` (None: it masks nothing), ``codebook`` and ``contexts``,
        a row for each context and part of the objective, with the bounds of intervals under ``NAME_interval``.
        ``loss_difference`` is in nats above the first model's loss; None with the reason in ``not_compared``.
    """
    masking = [name for name, model in models.items() if model.objectives.masks]
    window, results, first = None, [], None
    if masking:
        tightest = tightest_window(tightest_of(models[name].encoder, contexts[name]) for name in masking)
        window = tightest if mask_context is None else Window(AttContext(mask_context, 0))
    for name, model in models.items():
        scores = evaluate(model, batches[name], contexts[name], seed, window)
        first, sampling = first or scores, (resamples, confidence, seed)
        rows = [_row(model, scores, first, each, part, *sampling) for each in contexts[name] for part in scores.parts]
        masked_for = window.context.left if window and model.objectives.masks else None
        result = dict(model=name, objective=model.objective, mask_context=masked_for, codebook=scores.codebook)
        results.append({**result, 'contexts': rows})
    return results


def _row(model, scores: ModelScores, first: ModelScores, context: Sequence, part: str, *sampling) -> dict:
    label, frame_ms = context_label(context), attention_frame_ms(model)
    sums = scores.parts[part][label]
    lost, correct, frames = sums.columns()
    numerators = {'loss': lost, 'accuracy': correct}
    reason = None if scores is first else why_not_compared(scores, first, part, label)
    if scores is not first and reason is None:
        numerators['loss_difference'] = lost - first.parts[part][label].columns()[0]
    estimates = {name: ratio_of_sums(numerator, frames, *sampling) for name, numerator in numerators.items()}
    estimates['perplexity'] = tuple(np.exp(estimates['loss']).tolist())
    row: dict[str, Any] = dict(context=list(context), part=part, loss_difference=None, loss_difference_interval=None)
    for name, (value, *interval) in estimates.items():
        row.update({name: value, f'{name}_interval': interval})
    row.update(sums.baselines(), frames=int(frames.sum()), utterances=len(frames), not_compared=reason)
    return {**row, 'look_ahead_ms': look_ahead_ms(model.encoder, context, frame_ms)}
