# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Evaluate models of masked token prediction in their attention contexts, and write the figures."""

import argparse
import json
from pathlib import Path
from typing import Optional

from omegaconf import OmegaConf
from script_tools import sample_rate_of, write_text
from tqdm import tqdm


def contexts_of(model, wanted, name: str) -> list:
    """Return the contexts to evaluate a model in.

    Raises:
        ValueError: naming the model and the context, if it is no model of masked tokens, or its encoder cannot follow.
    """
    from nemo.collections.asr.parts.ssl_reports.validation import parse_contexts

    if not hasattr(model, 'predict_masked'):
        raise ValueError(f'{name}: {type(model).__name__} predicts no masked tokens')
    try:
        return parse_contexts(wanted, model.encoder, '--contexts')
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


def masking_window(models: dict, contexts: dict, left: Optional[int]):
    """Return the window of this left context; None: one that every layer of all models has, each in its contexts."""
    from nemo.collections.asr.parts.att_context.context import AttContext
    from nemo.collections.asr.parts.att_context.windows import Window, tightest_window
    from nemo.collections.asr.parts.ssl_reports.validation import tightest_of

    if left is not None:
        return Window(AttContext(left, 0))
    return tightest_window(tightest_of(model.encoder, contexts[name]) for name, model in models.items())


def evaluate_models(models: dict, contexts: dict, manifest: str, options: argparse.Namespace) -> list[dict]:
    """Evaluate models side by side.

    Args:
        models: by name, in order; the others are compared with the first.
        contexts: of each model, by its name.
        manifest: of the utterances.
        options: ``mask_context``, ``draws``, ``seed``, ``resamples``, ``confidence``, ``batch_size``, ``num_workers``.

    Returns:
        for each model ``model``, ``codebook`` and ``contexts``: a list of rows, see :func:`_row`.
    """
    from nemo.collections.asr.parts.ssl_reports.evaluation import evaluate

    window = masking_window(models, contexts, options.mask_context)
    found, results = {}, []
    for name, model in models.items():
        loader = loader_of(model, manifest, options.batch_size, options.num_workers)
        batches = tqdm(loader, desc=f'{name}, {len(contexts[name])} contexts', unit='batch')
        found[name] = evaluate(model, batches, contexts[name], options.seed, window, options.draws)
        results.append(
            {
                'model': name,
                'mask_context': window.context.left,
                'codebook': found[name].codebook,
                'contexts': [
                    {**_row(found, name, context, options), 'look_ahead_ms': look_ahead_of(model, context)}
                    for context in contexts[name]
                ],
            }
        )
    return results


def look_ahead_of(model, context) -> Optional[float]:
    """Return how many milliseconds of audio an output of the encoder may wait for; None: for all, or not known."""
    from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms
    from nemo.collections.asr.parts.ssl_reports.model_figures import attention_frame_ms

    frame_ms = attention_frame_ms(model)
    return None if frame_ms is None else look_ahead_ms(model.encoder, context, frame_ms)


def _row(found: dict, name: str, context, options: argparse.Namespace) -> dict:
    """Return the figures of a model in a context: values, and each one's bounds under NAME_interval."""
    from nemo.collections.asr.parts.att_context.context import context_label
    from nemo.collections.asr.parts.ssl_reports.evaluation import summarize

    sums = found[name].contexts[context_label(context)]
    row = {'context': list(context)}
    for figure, estimate in summarize(sums, options.resamples, options.confidence, options.seed).items():
        row[figure], row[f'{figure}_interval'] = estimate.value, [estimate.low, estimate.high]
    frames = sums.columns()[2]
    row.update(commonest=found[name].commonest, masked_frames=int(frames.sum()), utterances=len(frames))
    return {**row, 'loss_difference': _difference(found, name, context, options)}


def _difference(found: dict, name: str, context, options: argparse.Namespace) -> Optional[dict]:
    """Return by how much the loss is above the first model's in this context; None where they cannot be paired."""
    from nemo.collections.asr.parts.att_context.context import context_label
    from nemo.collections.asr.parts.ssl_reports.evaluation import loss_difference

    first, label = next(iter(found)), context_label(context)
    if name == first or label not in found[first].contexts:
        return None
    pair = found[name].contexts[label], found[first].contexts[label]
    estimate = loss_difference(*pair, options.resamples, options.confidence, options.seed)
    return estimate and {'value': estimate.value, 'interval': [estimate.low, estimate.high]}


def with_interval(row: dict, name: str, form: str) -> str:
    """Return a value with its interval, as text: ``3.063 [3.021, 3.102]``."""
    low, high = row[f'{name}_interval']
    return f'{form} [{form}, {form}]'.format(row[name], low, high)


def write_results(path: Path, results: list[dict], settings: dict) -> None:
    """Write everything as JSON, whole or not at all; what is not a number becomes null."""
    text = json.dumps(_without_nan({'settings': settings, 'models': results}), indent=2, allow_nan=False)
    write_text(path.resolve(), text + '\n')


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
