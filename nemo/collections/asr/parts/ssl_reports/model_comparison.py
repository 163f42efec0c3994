# SPDX-License-Identifier: Apache-2.0
"""Figures of several models in their attention contexts, side by side, on the same masks and utterances."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf

from nemo.collections.asr.parts.att_context.context import AttContext, context_label
from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms
from nemo.collections.asr.parts.att_context.windows import Window, tightest_window
from nemo.collections.asr.parts.ssl_reports.evaluation import (
    MASKED,
    ModelScores,
    evaluate,
    loss_difference,
    summarize,
    why_not_compared,
)
from nemo.collections.asr.parts.ssl_reports.model_figures import attention_frame_ms
from nemo.collections.asr.parts.ssl_reports.validation import parse_contexts, tightest_of


@dataclass(frozen=True)
class ComparisonOptions:
    """How models are compared."""

    mask_context: int | None = None
    """Left context that masks are drawn for; None: the tightest of all models and contexts."""
    draws: int = 1
    """How often each utterance is masked."""
    seed: int = 0
    """Of masks and bootstrap."""
    resamples: int = 1000
    """Of the bootstrap."""
    confidence: float = 0.95
    """Of the intervals."""


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
    settings = {
        'manifest_filepath': manifest,
        'sample_rate': model.preprocessor.featurizer.sample_rate,
        'batch_size': batch_size,
        'num_workers': num_workers,
        'shuffle': False,
        'labels': [],  # of transcripts, which are not used
    }
    return model._setup_dataloader_from_config(OmegaConf.create(settings))


def masking_window(models: Mapping, contexts: Mapping, left: int | None) -> Window | None:
    """Return the window that masks are drawn for; None if no model masks.

    Args:
        models: by name.
        contexts: of each model.
        left: its left context; None: the window that every layer of all models has in each context.
    """
    masking = [name for name, model in models.items() if model.objectives.masks]
    if not masking:
        return None
    if left is not None:
        return Window(AttContext(left, 0))
    return tightest_window(tightest_of(models[name].encoder, contexts[name]) for name in masking)


def compare_models(
    models: Mapping, contexts: Mapping, batches: Mapping[str, Iterable], options: ComparisonOptions
) -> list[dict]:
    """Evaluate models side by side.

    Args:
        models: by name, in order; the others are compared with the first.
        contexts: of each model.
        batches: the same utterances as batches of each model's loader.
        options: how.

    Returns:
        for each model ``model``, ``objective``, ``mask_context`` (None: it masks nothing), ``codebook`` and ``contexts``,
        a list of rows, one for each context and part of the objective: the figures, with the bounds of an interval
        under ``NAME_interval``. ``below_unigram`` is how many nats the loss is below the unigram entropy.
        ``loss_difference`` is by how much the loss is above the first model's; None with the reason in
        ``not_compared``, or for the first model itself.
    """
    window = masking_window(models, contexts, options.mask_context)
    results, first = [], None
    for name, model in models.items():
        scores = evaluate(model, batches[name], contexts[name], options.seed, window, options.draws)
        first = scores if first is None else first
        frame_ms, rows = attention_frame_ms(model), []
        for context in contexts[name]:
            wait = None if frame_ms is None else look_ahead_ms(model.encoder, context, frame_ms)
            for part in scores.parts:
                rows.append({**_row(scores, first, context, part, options), 'look_ahead_ms': wait})
        results.append(
            {
                'model': name,
                'objective': model.objective,
                'mask_context': window.context.left if model.objectives.masks else None,
                'codebook': scores.codebook,
                'contexts': rows,
            }
        )
    return results


def _row(scores: ModelScores, first: ModelScores, context: Sequence, part: str, options: ComparisonOptions) -> dict:
    label, sampling = context_label(context), (options.resamples, options.confidence, options.seed)
    sums = scores.parts[part][label]
    row = {'context': list(context), 'part': part}
    for figure, estimate in summarize(sums, *sampling).items():
        row[figure], row[f'{figure}_interval'] = estimate.value, [estimate.low, estimate.high]
    frames = sums.columns()[2]
    row.update(majority_class=sums.majority_class, unigram_entropy=sums.unigram_entropy)
    row.update(below_unigram=sums.unigram_entropy - row['loss'], frames=int(frames.sum()), utterances=len(frames))
    row.update(next_token_offset=None if part == MASKED else scores.offsets[label])
    row.update(loss_difference=None, loss_difference_interval=None, not_compared=None)
    if scores is not first:
        row['not_compared'] = why_not_compared(scores, first, part, label)
        if row['not_compared'] is None:
            estimate = loss_difference(sums, first.parts[part][label], *sampling)
            row.update(loss_difference=estimate.value, loss_difference_interval=[estimate.low, estimate.high])
    return row


def reasons_of(result: Mapping) -> list[str]:
    """Return, as text, in which parts and contexts a model cannot be compared with the first, and why."""
    where: dict[tuple, list] = {}
    for row in result['contexts']:
        if row['not_compared'] is not None:
            where.setdefault((row['part'], row['not_compared']), []).append(str(row['context']))
    return [f"{part} in {', '.join(contexts)}: {reason}" for (part, reason), contexts in where.items()]
