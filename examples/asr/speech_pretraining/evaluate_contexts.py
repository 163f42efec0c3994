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

The look-ahead is the audio that an output of the whole encoder may have to wait for, in milliseconds. Loss is in nats
per masked frame; "always the commonest" is the accuracy of guessing one token for every masked frame.

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
from evaluation_tools import contexts_of, evaluate_models, with_interval, write_results
from script_tools import check_folders, report_error, require_patches, restore

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
    _check_options(parser, options)
    return options


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Read the list in ``contexts``, and end with the parser's error if an option has a value that cannot be used."""
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
    check_folders(parser, options, 'json', 'csv')


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
    columns = ['look-ahead', 'loss', 'masked-token accuracy', 'perplexity', 'always the commonest', 'masked frames']
    for name in columns + ['loss above the first'] * several:
        made.add_column(name, justify='right')
    for result in results:
        for row in result['contexts']:
            cells = [', '.join(map(str, row['context'])), *_cells(row)]
            if several:
                cells = [_short(result['model'], results), *cells, _difference_cell(row['loss_difference'])]
            made.add_row(*cells)
    return made


def _cells(row: dict) -> list[str]:
    """Return the figures of one model in one context, as text."""
    from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_text

    cells = [look_ahead_text(row['look_ahead_ms']), with_interval(row, 'loss', '{:.3f}')]
    cells += [with_interval(row, 'accuracy', '{:.2%}')]
    return cells + [with_interval(row, 'perplexity', '{:.1f}'), f"{row['commonest']:.2%}", f"{row['masked_frames']}"]


def _difference_cell(difference: Optional[dict]) -> str:
    """Return by how much the loss is above the first model's, as text."""
    if difference is None:
        return '-'
    return with_interval({'value': difference['value'], 'value_interval': difference['interval']}, 'value', '{:+.3f}')


def _short(name: str, results: list[dict]) -> str:
    """Return a model's path as far as it tells the models apart."""
    paths = [os.path.abspath(result['model']) for result in results]
    return os.path.relpath(os.path.abspath(name), os.path.commonpath(list(map(os.path.dirname, paths))))


def write_csv(path: Path, results: list[dict]) -> None:
    """Write a row for each model and context, whole or not at all."""
    from nemo.utils.atomic_files import replacing

    rows = [_flat(row, result) for result in results for row in result['contexts']]
    with replacing(path.resolve()) as partial, open(partial, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _flat(row: dict, result: dict) -> dict:
    """Return a row of the CSV file: the figures of one context, each bound in a column of its own."""
    flat = {'model': result['model'], 'left': row['context'][0], 'right': row['context'][-1]}
    flat['look_ahead_ms'] = '' if row['look_ahead_ms'] is None else row['look_ahead_ms']
    for name in COLUMNS:
        flat[name], (flat[f'{name}_low'], flat[f'{name}_high']) = row[name], row[f'{name}_interval']
    flat.update({name: row[name] for name in ('commonest', 'masked_frames', 'utterances')})
    difference = row['loss_difference'] or {'value': '', 'interval': ['', '']}
    flat['loss_difference'] = difference['value']
    flat['loss_difference_low'], flat['loss_difference_high'] = difference['interval']
    return {**flat, 'mask_context': result['mask_context']}


def main(argv=None) -> int:
    """Evaluate, print and write; return the exit status."""
    options = arguments(argv)
    require_patches(__file__)
    try:
        names = [str(path) for path in options.model_path]
        if len(set(names)) < len(names):
            raise ValueError(f"--model_path names a file twice: {', '.join(names)}")
        models = {name: restore(path, options.device) for name, path in zip(names, options.model_path)}
        contexts = {name: contexts_of(model, options.contexts, name) for name, model in models.items()}
        results = evaluate_models(models, contexts, options.manifest, options)
    except (ValueError, OSError) as error:
        return report_error(__file__, error, status=2)
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table(results, options.confidence))
    settings = {name: getattr(options, name) for name in ('manifest', 'draws', 'seed', 'resamples', 'confidence')}
    settings.update(nemo=version('nemo_toolkit'), torch=torch.__version__, device=options.device)
    if options.json is not None:
        write_results(options.json, results, settings)
    if options.csv is not None:
        write_csv(options.csv, results)
    return 0


if __name__ == '__main__':
    sys.exit(main())
