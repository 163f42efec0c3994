# SPDX-License-Identifier: Apache-2.0
r"""Say what pre-trained models know of masked and of coming speech in each attention context, and how sure that is.

    python evaluate_contexts.py --model_path model.nemo --manifest validation.json
    python evaluate_contexts.py --model_path new.nemo old.nemo --manifest validation.json \
        --contexts "[[10,0],[40,0],[-1,0]]" --json evaluated.json --csv evaluated.csv

Any NeMo model of masked token prediction will do, those that stock NeMo made included, and those that predict next
tokens (model.objective). Each part of a model's objective has rows of its own: "masked", the masked tokens; "next_0",
the first token that a frame is asked for ahead of what it has heard, "next_1" and so on; and "next", all of these.

Each utterance is masked the same in every context and in every model with the same masking settings: the masks depend
on --seed, on the utterance and on the left context they are drawn for, by default the tightest of all contexts and
models that mask, so that what is masked can be answered everywhere. Next tokens are predicted from what is not masked,
by every model. Intervals are bootstrapped over utterances; models are compared with the first, utterance by utterance,
in the parts and contexts that both have, if they are asked for the same tokens in the same frames; otherwise it is
said why not.

The look-ahead is the audio that an output of the whole encoder may have to wait for, in milliseconds. Loss is in nats
per frame; "always the commonest" is the accuracy of guessing one token for every frame. The unigram entropy is the
loss of one who knows how common each token is, and nothing else; what a model knows of the speech is by how much its
loss is below that.

Exit status: 0; 2 if a model, a context or the manifest cannot be used.
"""

import argparse
import csv
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from evaluation_tools import contexts_of, evaluate_models, reasons_of, with_interval, write_results
from script_tools import check_folders, report_error, require_patches, restore

COLUMNS = ('loss', 'accuracy', 'perplexity')
# Columns that files of version 0.1 do not have come behind those that they have.
LATER_COLUMNS = ('frames', 'unigram_entropy', 'below_unigram', 'next_token_offset')


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
    parser.add_argument('--csv', type=Path, help='a CSV file for the figures, a row for each model, context and part')
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
    """Lay the results out, a row for each model, context and part of its objective."""
    from rich.table import Table

    several = len(results) > 1
    masked_only = all(row['part'] == 'masked' for result in results for row in result['contexts'])
    title = 'Masked tokens predicted' if masked_only else 'Tokens predicted'
    made = Table(title=f'{title}, by attention context', caption=_caption(results, confidence))
    for name in ['model'] * several + ['context', 'look-ahead'] + ['part'] * (not masked_only):
        made.add_column(name, justify='right' if name == 'look-ahead' else 'left')
    columns = ['loss', 'masked-token accuracy' if masked_only else 'accuracy', 'perplexity', 'always the commonest']
    columns += ['unigram entropy', 'loss below it', 'masked frames' if masked_only else 'frames']
    for name in columns + ['loss above the first'] * several:
        made.add_column(name, justify='right')
    for result in results:
        for row in result['contexts']:
            made.add_row(*_cells(row, result, results, masked_only))
        made.add_section()
    return made


def _caption(results: list[dict], confidence: float) -> str:
    """Return what there is to know of all rows."""
    rows = [row for result in results for row in result['contexts']]
    caption = f"in brackets: {confidence:.0%} intervals, bootstrapped over {rows[0]['utterances']} utterances"
    masks = [result['mask_context'] for result in results if result['mask_context'] is not None]
    return f'{caption}; masks for a left context of {masks[0]}' if masks else caption


def _cells(row: dict, result: dict, results: list[dict], masked_only: bool) -> list[str]:
    """Return the cells of a row of the table, as text."""
    from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_text

    several = len(results) > 1
    cells = [_short(result['model'], results)] * several + [', '.join(map(str, row['context']))]
    cells += [look_ahead_text(row['look_ahead_ms'])] + [row['part']] * (not masked_only)
    cells += [with_interval(row, 'loss', '{:.3f}'), with_interval(row, 'accuracy', '{:.2%}')]
    cells += [f"{row['perplexity']:.1f}", f"{row['commonest']:.2%}"]  # the files have its interval, exp of the loss's
    cells += [f"{row['unigram_entropy']:.3f}", f"{row['below_unigram']:+.3f}", f"{row['frames']}"]
    return cells + [_difference_cell(row['loss_difference'])] * several


def _difference_cell(difference: dict | None) -> str:
    """Return by how much the loss is above the first model's, as text."""
    if difference is None:
        return '-'
    return with_interval({'value': difference['value'], 'value_interval': difference['interval']}, 'value', '{:+.3f}')


def _short(name: str, results: list[dict]) -> str:
    """Return a model's path as far as it tells the models apart."""
    paths = [os.path.abspath(result['model']) for result in results]
    return os.path.relpath(os.path.abspath(name), os.path.commonpath(list(map(os.path.dirname, paths))))


def reasons(results: list[dict]) -> list[str]:
    """Return in sentences, for each model after the first, where it cannot be compared with that, and why not."""
    first = _short(results[0]['model'], results)
    return [
        f"{_short(result['model'], results)} cannot be compared with {first} in {reason}"
        for result in results[1:]
        for reason in reasons_of(result)
    ]


def write_csv(path: Path, results: list[dict]) -> None:
    """Write a row for each model, context and part, whole or not at all."""
    from nemo.utils.atomic_files import replacing

    rows = [_flat(row, result) for result in results for row in result['contexts']]
    with replacing(path.resolve()) as partial, open(partial, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _flat(row: dict, result: dict) -> dict:
    """Return a row of the CSV file: the figures of a context and part, each bound in a column of its own."""
    flat = {'model': result['model'], 'left': row['context'][0], 'right': row['context'][-1]}
    flat['look_ahead_ms'] = '' if row['look_ahead_ms'] is None else row['look_ahead_ms']
    for name in COLUMNS:
        flat[name], (flat[f'{name}_low'], flat[f'{name}_high']) = row[name], row[f'{name}_interval']
    flat.update({name: row.get(name, '') for name in ('commonest', 'masked_frames', 'utterances')})
    difference = row['loss_difference'] or {'value': '', 'interval': ['', '']}
    flat['loss_difference'] = difference['value']
    flat['loss_difference_low'], flat['loss_difference_high'] = difference['interval']
    flat['mask_context'] = '' if result['mask_context'] is None else result['mask_context']
    flat.update(objective=result['objective'], part=row['part'], not_compared=row['not_compared'] or '')
    return {**flat, **{name: row.get(name, '') for name in LATER_COLUMNS}}


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

    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(table(results, options.confidence))
    for reason in reasons(results):
        console.print(reason, markup=False, highlight=False)
    settings = {name: getattr(options, name) for name in ('manifest', 'draws', 'seed', 'resamples', 'confidence')}
    settings.update(nemo=version('nemo_toolkit'), torch=torch.__version__, device=options.device)
    if options.json is not None:
        write_results(options.json, results, settings)
    if options.csv is not None:
        write_csv(options.csv, results)
    return 0


if __name__ == '__main__':
    sys.exit(main())
