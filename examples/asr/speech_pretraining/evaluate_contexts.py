# SPDX-License-Identifier: Apache-2.0
r"""Evaluate the predictions of pre-trained models in each attention context, with confidence intervals.

    python evaluate_contexts.py --model model.nemo --manifest validation.json
    python evaluate_contexts.py --model new.nemo old.nemo --manifest validation.json \
        --contexts "[[10,0],[40,0],[-1,0]]" --output evaluated.json evaluated.csv

Models of masked and of next token prediction are evaluated, those of stock NeMo included. Each part of a model's objective
has a row: "masked", the masked tokens; "next_0", the next token, "next_1" and so on; and "next", all horizons.

Each utterance is masked the same in every context, and in every model with the same masking settings. The masks depend
on --seed, on the utterance and on --mask-context, by default the tightest left context of all contexts and models, so
that each masked frame has a visible frame in its window everywhere. Next tokens are predicted without masks. Intervals
are bootstrapped over utterances. Models are compared with the first, utterance by utterance, in the parts and contexts
where both predict the same tokens of the same frames.

The look-ahead is the later audio that an output of the encoder depends on at most. Loss is in nats per frame. "majority class"
is the accuracy of a model that always predicts the most frequent token, and the unigram entropy the loss of one that
predicts each token by its frequency.

Exit status: 0; 2 if a model, a context or the manifest cannot be used.
"""

import argparse
import csv
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from script_tools import check_folders, context_option, report_error, require_patches, restore


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path, nargs='+', required=True, help='one .nemo file or more')
    parser.add_argument('--manifest', required=True, help='NeMo manifest, or a pattern of several')
    parser.add_argument('--output', type=Path, nargs='+', default=[], help='files for the figures: .json, .csv')
    parser.add_argument('--contexts', type=context_option, default='all', help='"[[10,0],[40,0]]", first or all (all)')
    parser.add_argument('--mask-context', type=int, help='left context that masks are drawn for (the smallest of all)')
    parser.add_argument('--seed', type=int, default=0, help='seed of masks and bootstrap (0)')
    parser.add_argument('--resamples', type=int, default=1000, help='resamples of the bootstrap (1000)')
    parser.add_argument('--confidence', type=float, default=0.95, help='confidence of the intervals (0.95)')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--num-workers', type=int, default=0, help='processes that read audio (0: this one)')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (cpu)')
    options = parser.parse_args(argv)
    _check_options(parser, options)
    return options


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with the parser's error if an option has a value that cannot be used."""
    lowest = {'mask_context': -1, 'seed': 0, 'resamples': 1, 'batch_size': 1, 'num_workers': 0}
    for name, least in lowest.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
    if not 0 < options.confidence < 1:
        parser.error(f'--confidence is {options.confidence}; it must lie between 0 and 1')
    if len(set(options.model)) < len(options.model):
        parser.error(f"--model names a file twice: {', '.join(map(str, options.model))}")
    for path in options.output:
        if path.suffix not in ('.json', '.csv'):
            parser.error(f'--output {path}: it must end in .json or .csv')
        check_folders(parser, argparse.Namespace(output=path), 'output')


def table(results: list[dict], confidence: float):
    """Lay out the results, a row for each model, context and part."""
    from rich.table import Table

    rows = [(result['model'], row) for result in results for row in result['contexts']]
    caption = f"in brackets: {confidence:.0%} intervals over {rows[0][1]['utterances']} utterances"
    masks = [result['mask_context'] for result in results if result['mask_context'] is not None]
    caption += f'; masks for a left context of {masks[0]}' if masks else ''
    cells = [_cells(name if len(results) > 1 else None, row) for name, row in rows]
    made = Table(*cells[0], caption=caption)
    for each in cells:
        made.add_row(*each.values())
    return made


def _cells(model: str | None, row: dict) -> dict[str, str]:
    """Return a row of the table, by column."""
    from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_text

    cells = {} if model is None else {'model': model}
    cells.update({'context': str(row['context']), 'look-ahead': look_ahead_text(row['look_ahead_ms'])})
    cells.update({'part': row['part'], 'loss': _interval(row, 'loss', '{:.3f}')})
    cells.update({'accuracy': _interval(row, 'accuracy', '{:.2%}'), 'majority class': f"{row['majority_class']:.2%}"})
    cells.update({'unigram entropy': f"{row['unigram_entropy']:.3f}", 'frames': str(row['frames'])})
    if model is not None:
        cells['loss above the first'] = _interval(row, 'loss_difference', '{:+.3f}')
    return cells


def _interval(row: dict, name: str, form: str) -> str:
    """Return a value with its interval, as text: ``3.063 [3.021, 3.102]``."""
    if row[name] is None:
        return '-'
    return f'{form} [{form}, {form}]'.format(row[name], *row[f'{name}_interval'])


def write_csv(path: Path, results: list[dict]) -> None:
    """Write a row for each model, context and part, atomically; interval bounds have columns."""
    from nemo.utils.atomic_files import replacing

    rows = []
    for result in results:
        for row in result['contexts']:
            flat = {'model': result['model'], 'left': row['context'][0], 'right': row['context'][-1]}
            for name, value in row.items():
                if name.endswith('_interval'):
                    stem = name.removesuffix('_interval')
                    flat[f'{stem}_low'], flat[f'{stem}_high'] = value or (None, None)
                elif name != 'context':
                    flat[name] = value
            rows.append({**flat, 'objective': result['objective'], 'mask_context': result['mask_context']})
    with replacing(path.resolve()) as partial, open(partial, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def compare(options: argparse.Namespace) -> list[dict]:
    """Return the results of :func:`compare_models`; a model's name is its path from the folder of all."""
    from tqdm import tqdm

    from nemo.collections.asr.data.data_checks import check_manifest
    from nemo.collections.asr.parts.ssl_reports import evaluation
    from nemo.collections.asr.parts.utils.manifest_index import expanded

    manifests = expanded(options.manifest)
    for manifest in manifests:
        check_manifest(manifest, '--manifest')
    folder = os.path.commonpath([path.resolve().parent for path in options.model])
    models = {os.path.relpath(path.resolve(), folder): restore(path, options.device) for path in options.model}
    contexts = {name: evaluation.contexts_of(model, options.contexts, name) for name, model in models.items()}
    size = options.batch_size, options.num_workers
    loaders = {name: evaluation.loader_of(model, ','.join(manifests), *size) for name, model in models.items()}
    batches = {name: tqdm(loader, desc=name, unit='batch') for name, loader in loaders.items()}
    settings = (options.mask_context, options.seed, options.resamples, options.confidence)
    return evaluation.compare_models(models, contexts, batches, *settings)


def main(argv=None) -> int:
    """Evaluate, print and write; return the exit status."""
    options = arguments(argv)
    require_patches(__file__)
    from rich.console import Console

    from nemo.utils.atomic_files import write_json

    try:
        results = compare(options)
    except (ValueError, OSError) as error:
        return report_error(__file__, error)
    Console(width=None if sys.stdout.isatty() else 190).print(table(results, options.confidence))
    for result in results[1:]:
        reasons = {row['part']: row['not_compared'] for row in result['contexts'] if row['not_compared']}
        for part, reason in reasons.items():
            print(f"{result['model']} is not compared with {results[0]['model']}, {part}: {reason}")
    settings = {name: getattr(options, name) for name in ('seed', 'resamples', 'confidence', 'device')}
    settings.update(manifest=options.manifest, nemo=version('nemo_toolkit'), torch=torch.__version__)
    for path in options.output:
        if path.suffix == '.csv':
            write_csv(path, results)
        else:
            write_json(path, {'settings': settings, 'models': results})
    return 0


if __name__ == '__main__':
    sys.exit(main())
