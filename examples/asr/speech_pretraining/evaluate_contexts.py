# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Say what pre-trained models know of masked speech in each attention context, and how sure that is.

    python evaluate_contexts.py --model_path model.nemo --manifest validation.json
    python evaluate_contexts.py --model_path new.nemo old.nemo --manifest validation.json \
        --contexts "[[10,0],[40,0],[-1,0]]" --json evaluated.json --csv evaluated.csv

Any NeMo model of masked token prediction will do, those that stock NeMo made included. Each utterance is masked the
same in every context and in every model with the same masking settings: the masks depend on --seed, on the utterance
and on the left context they are drawn for, by default the tightest of all contexts and models, so that what is masked
can be answered everywhere. Intervals are bootstrapped over utterances; models are compared utterance by utterance with
the first.

Loss is in nats per masked frame; "always the commonest" is the accuracy of guessing one token for every masked frame.

Exit status: 0; 2 if a model, a context or the manifest cannot be used.
"""

import argparse
import csv
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Optional

import torch
from omegaconf import OmegaConf
from streaming_inference_example import restore
from tqdm import tqdm

COLUMNS = ('loss', 'accuracy', 'perplexity')


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model_path', type=Path, nargs='+', required=True, help='one .nemo file or more')
    parser.add_argument('--manifest', required=True, help='NeMo manifest of the speech to predict')
    parser.add_argument('--contexts', default='all', help='such as "[[10,0],[40,0]]"; all or the first of each model')
    parser.add_argument('--mask_context', type=int, help='left context that masks are drawn for (the tightest)')
    parser.add_argument('--draws', type=int, default=1, help='how often each utterance is masked (1)')
    parser.add_argument('--seed', type=int, default=0, help='of masks and bootstrap (0)')
    parser.add_argument('--resamples', type=int, default=1000, help='of the bootstrap (1000)')
    parser.add_argument('--confidence', type=float, default=0.95, help='of the intervals (0.95)')
    parser.add_argument('--batch_size', type=int, default=8)
    parser.add_argument('--num_workers', type=int, default=0, help='processes that read audio (0: this one does)')
    parser.add_argument('--device', default='cpu', help='where the models run (cpu)')
    parser.add_argument('--json', type=Path, help='a JSON file for the figures')
    parser.add_argument('--csv', type=Path, help='a CSV file for the figures, a row for each model and context')
    options = parser.parse_args(argv)
    if options.contexts not in ('all', 'first'):
        try:
            options.contexts = json.loads(options.contexts)
        except json.JSONDecodeError as error:
            parser.error(f'--contexts {options.contexts} is no JSON list of contexts: {error}')
    if options.mask_context is not None and options.mask_context < -1:
        parser.error('--mask_context must be -1 (unlimited) or more')
    if min(options.seed, options.num_workers) < 0 or min(options.draws, options.resamples, options.batch_size) < 1:
        parser.error('--seed and --num_workers must be 0 or more, --draws, --resamples and --batch_size 1 or more')
    if not 0 < options.confidence < 1:
        parser.error('--confidence must lie between 0 and 1')
    if not Path(options.manifest).is_file():
        parser.error(f'--manifest {options.manifest}: there is no such file')
    for name in ('json', 'csv'):
        path = getattr(options, name)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f'--{name} {path}: there is no folder {path.resolve().parent}')
    return options


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
        'sample_rate': model.preprocessor.featurizer.sample_rate,
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
        rows = [_row(found[name], context, options) for context in contexts[name]]
        for row, context in zip(rows, contexts[name]):
            row['loss_difference'] = _difference(found, name, context, options)
        results.append(
            {'model': name, 'mask_context': window.context.left, 'codebook': found[name].codebook, 'contexts': rows}
        )
    return results


def _row(scores, context, options: argparse.Namespace) -> dict:
    """Return the figures of a model in a context: values, and each one's bounds under NAME_interval."""
    from nemo.collections.asr.parts.att_context.context import context_label
    from nemo.collections.asr.parts.ssl_reports.evaluation import summarize

    sums = scores.contexts[context_label(context)]
    row = {'context': list(context)}
    for name, estimate in summarize(sums, options.resamples, options.confidence, options.seed).items():
        row[name], row[f'{name}_interval'] = estimate.value, [estimate.low, estimate.high]
    frames = sums.columns()[2]
    return {**row, 'commonest': scores.commonest, 'masked_frames': int(frames.sum()), 'utterances': len(frames)}


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


def table(results: list[dict], confidence: float):
    """Lay the results out, a row for each model and context."""
    from rich.table import Table

    several = len(results) > 1
    made = Table(
        title='Masked tokens predicted, by attention context',
        caption=f"in brackets: {confidence:.0%} intervals, bootstrapped over "
        f"{results[0]['contexts'][0]['utterances']} utterances; masks for a left context of {results[0]['mask_context']}",
    )
    for name in ['model'] * several + ['context']:
        made.add_column(name)
    columns = ['loss', 'masked-token accuracy', 'perplexity', 'always the commonest', 'masked frames']
    for name in columns + ['loss above the first'] * several:
        made.add_column(name, justify='right')
    for result in results:
        for row in result['contexts']:
            cells = [with_interval(row, 'loss', '{:.3f}'), with_interval(row, 'accuracy', '{:.2%}')]
            cells += [with_interval(row, 'perplexity', '{:.1f}'), f"{row['commonest']:.2%}", f"{row['masked_frames']}"]
            difference = row['loss_difference']
            if several:
                cells.append(with_interval(_as_row(difference), 'value', '{:+.3f}') if difference else '-')
            named = _short(result['model'], results)
            made.add_row(*[named] * several, ', '.join(map(str, row['context'])), *cells)
    return made


def _short(name: str, results: list[dict]) -> str:
    """Return a model's path as far as it tells the models apart."""
    paths = [os.path.abspath(result['model']) for result in results]
    return os.path.relpath(os.path.abspath(name), os.path.commonpath(list(map(os.path.dirname, paths))))


def _as_row(difference: dict) -> dict:
    return {'value': difference['value'], 'value_interval': difference['interval']}


def with_interval(row: dict, name: str, form: str) -> str:
    """Return a value with its interval, as text: ``3.063 [3.021, 3.102]``."""
    low, high = row[f'{name}_interval']
    return f'{form} [{form}, {form}]'.format(row[name], low, high)


def write_json(path: Path, results: list[dict], settings: dict) -> None:
    """Write everything as JSON, whole or not at all; what is not a number becomes null."""
    from nemo.utils.atomic_files import replacing

    text = json.dumps(_without_nan({'settings': settings, 'models': results}), indent=2, allow_nan=False)
    with replacing(path.resolve()) as partial:
        partial.write_text(text + '\n', encoding='utf-8')


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def write_csv(path: Path, results: list[dict]) -> None:
    """Write a row for each model and context, whole or not at all."""
    from nemo.utils.atomic_files import replacing

    rows = []
    for result in results:
        for row in result['contexts']:
            flat = {'model': result['model'], 'left': row['context'][0], 'right': row['context'][-1]}
            for name in COLUMNS:
                flat[name], (flat[f'{name}_low'], flat[f'{name}_high']) = row[name], row[f'{name}_interval']
            flat.update({name: row[name] for name in ('commonest', 'masked_frames', 'utterances')})
            difference = row['loss_difference'] or {'value': '', 'interval': ['', '']}
            flat['loss_difference'] = difference['value']
            flat['loss_difference_low'], flat['loss_difference_high'] = difference['interval']
            rows.append({**flat, 'mask_context': result['mask_context']})
    with replacing(path.resolve()) as partial, open(partial, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(argv=None) -> int:
    """Evaluate, print, write; returns the exit status."""
    options = arguments(argv)
    try:
        names = [str(path) for path in options.model_path]
        if len(set(names)) < len(names):
            raise ValueError(f"--model_path names a file twice: {', '.join(names)}")
        models = {name: restore(path, options.device) for name, path in zip(names, options.model_path)}
        contexts = {name: contexts_of(model, options.contexts, name) for name, model in models.items()}
        results = evaluate_models(models, contexts, options.manifest, options)
    except (ValueError, OSError) as error:
        print(f'evaluate_contexts: error: {error}', file=sys.stderr)
        return 2
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table(results, options.confidence))
    settings = {name: getattr(options, name) for name in ('manifest', 'draws', 'seed', 'resamples', 'confidence')}
    settings.update(nemo=version('nemo_toolkit'), torch=torch.__version__, device=options.device)
    if options.json is not None:
        write_json(options.json, results, settings)
    if options.csv is not None:
        write_csv(options.csv, results)
    return 0


if __name__ == '__main__':
    sys.exit(main())
