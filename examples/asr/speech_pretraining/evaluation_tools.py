# SPDX-License-Identifier: Apache-2.0
"""Evaluate models of masked and of next token prediction in their attention contexts, and write the figures."""

import argparse
import json
from pathlib import Path

from omegaconf import OmegaConf
from script_tools import sample_rate_of, write_text
from tqdm import tqdm


def contexts_of(model, wanted, name: str) -> list:
    """Return the contexts to evaluate a model in.

    Raises:
        ValueError: naming the model and the context, if it predicts no tokens, its encoder cannot follow, or it
            predicts next tokens and the context leaves none unheard.
    """
    from nemo.collections.asr.parts.ssl_reports.validation import parse_contexts

    if not hasattr(model, 'objectives'):
        raise ValueError(f'{name}: {type(model).__name__} predicts neither masked nor next tokens')
    try:
        contexts = parse_contexts(wanted, model.encoder, '--contexts')
        for context in contexts:
            with model.encoder.using_att_context_size(context):
                model.objectives.offset()  # raises where there is none
        return contexts
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error


def loader_of(model, manifest: str, batch_size: int, num_workers: int):
    """Return the data loader that the model itself makes of a manifest: every utterance once, in its order."""
    settings = {
        'manifest_filepath': manifest,
        'sample_rate': sample_rate_of(model),
        'batch_size': batch_size,
        'num_workers': num_workers,
        'shuffle': False,
        'labels': [],  # of transcripts, which nobody reads
    }
    return model._setup_dataloader_from_config(OmegaConf.create(settings))


def masking_window(models: dict, contexts: dict, left: int | None):
    """Return the window of this left context; None for it: one that every layer of all models has, each in its contexts.

    Returns None if no model masks anything.
    """
    from nemo.collections.asr.parts.att_context.context import AttContext
    from nemo.collections.asr.parts.att_context.windows import Window, tightest_window
    from nemo.collections.asr.parts.ssl_reports.validation import tightest_of

    masking = [name for name, model in models.items() if model.objectives.masks]
    if not masking:
        return None
    if left is not None:
        return Window(AttContext(left, 0))
    return tightest_window(tightest_of(models[name].encoder, contexts[name]) for name in masking)


def evaluate_models(models: dict, contexts: dict, manifest: str, options: argparse.Namespace) -> list[dict]:
    """Evaluate models side by side.

    Args:
        models: by name, in order; the others are compared with the first.
        contexts: of each model, by its name.
        manifest: of the utterances.
        options: ``mask_context``, ``draws``, ``seed``, ``resamples``, ``confidence``, ``batch_size``, ``num_workers``.

    Returns:
        for each model ``model``, ``objective``, ``mask_context`` (None: it masks nothing), ``codebook``, ``contexts``: a
        list of rows, one for each context and part of the objective, see :func:`_row`; and ``not_compared``, see
        :func:`_not_compared`.
    """
    from nemo.collections.asr.parts.ssl_reports.evaluation import evaluate

    window = masking_window(models, contexts, options.mask_context)
    found, results = {}, []
    for name, model in models.items():
        loader = loader_of(model, manifest, options.batch_size, options.num_workers)
        batches = tqdm(loader, desc=f'{name}, {len(contexts[name])} contexts', unit='batch')
        found[name] = evaluate(model, batches, contexts[name], options.seed, window, options.draws)
        first = next(iter(found.values()))
        pairs = [(context, part) for context in contexts[name] for part in found[name].parts]
        results.append(
            {
                'model': name,
                'objective': model.objective,
                'mask_context': window.context.left if model.objectives.masks else None,
                'codebook': found[name].codebook,
                'contexts': [
                    {
                        **_row(found[name], first, context, part, options),
                        'look_ahead_ms': look_ahead_of(model, context),
                    }
                    for context, part in pairs
                ],
                'not_compared': _not_compared(found[name], first, contexts[name]),
            }
        )
    return results


def look_ahead_of(model, context) -> float | None:
    """Return how many milliseconds of audio an output of the encoder may wait for; None: for all, or not known."""
    from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms
    from nemo.collections.asr.parts.ssl_reports.model_figures import attention_frame_ms

    frame_ms = attention_frame_ms(model)
    return None if frame_ms is None else look_ahead_ms(model.encoder, context, frame_ms)


def _row(scores, first, context, part: str, options: argparse.Namespace) -> dict:
    """Return the figures of a model in a part and a context: values, and the bounds of some under NAME_interval.

    ``below_unigram`` is by how many nats the loss is below ``unigram_entropy``, that of knowing how common each token
    is. ``loss_difference`` is None with the reason in ``not_compared``, and for the first model itself, without one.

    Args:
        scores: of the model.
        first: of the model that it is compared with; ``scores`` itself, if it is the first.
        context: of the encoder.
        part: of the objective.
        options: as for :func:`evaluate_models`.
    """
    from nemo.collections.asr.parts.att_context.context import context_label
    from nemo.collections.asr.parts.ssl_reports.evaluation import loss_difference, summarize, why_not_compared

    label, sampling = context_label(context), (options.resamples, options.confidence, options.seed)
    sums = scores.parts[part][label]
    row = {'context': list(context), 'part': part}
    for figure, estimate in summarize(sums, *sampling).items():
        row[figure], row[f'{figure}_interval'] = estimate.value, [estimate.low, estimate.high]
    frames = sums.columns()[2]
    row.update(commonest=sums.commonest, unigram_entropy=sums.unigram_entropy)
    row.update(below_unigram=sums.unigram_entropy - row['loss'], frames=int(frames.sum()), utterances=len(frames))
    row.update({'masked_frames': row['frames']} if part == 'masked' else {'next_token_offset': scores.offsets[label]})
    row.update(loss_difference=None, not_compared=None)
    if scores is first:
        return row
    row['not_compared'] = why_not_compared(scores, first, part, label)
    if row['not_compared'] is None:
        estimate = loss_difference(sums, first.parts[part][label], *sampling)
        row['loss_difference'] = {'value': estimate.value, 'interval': [estimate.low, estimate.high]}
    return row


def _not_compared(scores, first, contexts: list) -> list[dict]:
    """Return where a model cannot be compared with the first, and why not.

    Returns:
        for each reason ``why``, in words, the ``parts`` and ``contexts`` that it holds for; parts of either model.
    """
    from nemo.collections.asr.parts.att_context.context import context_label
    from nemo.collections.asr.parts.ssl_reports.evaluation import why_not_compared

    if scores is first:
        return []
    reasons = {}
    for part in dict.fromkeys([*scores.parts, *first.parts]):
        for context in contexts:
            why = why_not_compared(scores, first, part, context_label(context))
            if why is not None:
                reasons.setdefault((part, why), []).append(list(context))
    found = []
    for (part, why), where in reasons.items():
        same = next((known for known in found if (known['why'], known['contexts']) == (why, where)), None)
        if same is None:
            found.append({'why': why, 'parts': [part], 'contexts': where})
        else:
            same['parts'].append(part)
    return found


def reasons_of(result: dict) -> list[str]:
    """Return in sentences where a model of :func:`evaluate_models` cannot be compared with the first, and why not."""
    contexts = [row['context'] for row in result['contexts']]
    lines = []
    for reason in result['not_compared']:
        everywhere = all(context in reason['contexts'] for context in contexts)
        where = '' if everywhere else f" in {', '.join(map(str, reason['contexts']))}"
        lines.append(f"{', '.join(reason['parts'])}{where}: {reason['why']}")
    return lines


def with_interval(row: dict, name: str, form: str) -> str:
    """Return a value with its interval, as text: ``3.063 [3.021, 3.102]``."""
    low, high = row[f'{name}_interval']
    return f'{form} [{form}, {form}]'.format(row[name], low, high)


def write_results(path: Path, results: list[dict], settings: dict) -> None:
    """Write everything as JSON, whole or not at all; what is not a number becomes null."""
    write_json(path, {'settings': settings, 'models': results})


def write_json(path: Path, contents: dict) -> None:
    """Write JSON, whole or not at all; what is not a number becomes null."""
    write_text(path.resolve(), json.dumps(_without_nan(contents), indent=2, allow_nan=False) + '\n')


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
