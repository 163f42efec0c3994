# SPDX-License-Identifier: Apache-2.0
"""The first part of the demo's report: what pre-training has learned, beside an untrained model, and its pictures."""

import argparse
from pathlib import Path

import demo_stages
from evaluation_tools import contexts_of, evaluate_models, reasons_of, with_interval, write_json
from streaming_tools import chunk_seconds, parity_line, stream_one, streamable_contexts

SEED = 0
EVALUATION = argparse.Namespace(
    mask_context=None, draws=2, seed=SEED, resamples=1000, confidence=0.95, batch_size=8, num_workers=0
)


def evaluate(trained, manifest: str) -> list[dict]:
    """Return the results of :func:`evaluate_models` for the model as it was at the start of its training, and now."""
    import lightning.pytorch as pl

    pl.seed_everything(SEED)  # as the training script does: the same initial weights
    models = {'start': type(trained)(trained.cfg), 'end': trained}
    contexts = {name: contexts_of(model, 'all', name) for name, model in models.items()}
    return evaluate_models(models, contexts, manifest, EVALUATION)


def show(results: list[dict], console) -> None:
    """Print the table of the results, and where start and end cannot be compared."""
    console.print(learning_table(*results))
    for reason in reasons_of(results[1]):
        demo_stages.say(f'Start and end cannot be compared in {reason}')


def show_parity(trained, audio: str) -> None:
    """Stream an audio in each context that can be streamed, and print how far that is from offline."""
    for context in streamable_contexts(trained.eval()):
        demo_stages.say(parity_line(stream_one(trained, audio, chunk_seconds(trained, context), context)))


def by_context(start: dict, end: dict) -> dict[str, dict]:
    """Return the figures that say in each context whether something was learned, by the context's name.

    They are those of the objective's last part: of all horizons together where next tokens are predicted, else of the
    masked frames.
    """
    from nemo.collections.asr.parts.att_context.context import context_label

    found = {}
    for before, after in zip(start['contexts'], end['contexts'], strict=True):
        found[context_label(after['context'])] = {  # of several parts in a context the last remains
            'part': after['part'],
            'loss_start': before['loss'],
            'loss_end': after['loss'],
            'unigram_entropy': after['unigram_entropy'],
            'accuracy_end': after['accuracy'],
            'commonest_share': after['commonest'],
        }
    return found


def write_learned(path: Path, results: list[dict], recogniser) -> None:
    """Write what was learned as JSON, whole or not at all.

    Args:
        path: of the file.
        results: of :func:`evaluate`.
        recogniser: character error rates by arm and context, or None.
    """
    contents = {'contexts': by_context(*results), 'recogniser': recogniser}
    contents.update(settings=vars(EVALUATION), models=results)
    write_json(path, contents)


def learning_table(start: dict, end: dict):
    """Lay out the results of :func:`evaluate_models` for a model before and after its training."""
    from rich.table import Table

    from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_text

    use = end['codebook']
    masked_only = all(row['part'] == 'masked' for row in end['contexts'])
    table = Table(
        title=f"What was learned, on {'masked frames of ' * masked_only}the validation data",
        caption=f"in brackets: 95% intervals over {end['contexts'][0]['utterances']} utterances; targets: "
        f"{use['codes_used']:.0f} of {use['classes']} codes used, perplexity {use['perplexity']:.0f}, the commonest "
        f"for {use['top_share']:.1%} of the frames",
    )
    table.add_column('context')
    table.add_column('look-ahead', justify='right')
    if not masked_only:
        table.add_column('part')
    columns = ['loss at start', 'at end', 'unigram entropy', 'accuracy at start', 'at end', 'always the commonest']
    for name in columns:
        table.add_column(name, justify='right')
    for before, after in zip(start['contexts'], end['contexts'], strict=True):
        cells = [after['part']] * (not masked_only)
        cells += [f"{before['loss']:.3f}", with_interval(after, 'loss', '{:.3f}')]
        cells += [
            f"{after['unigram_entropy']:.3f}",
            f"{before['accuracy']:.2%}",
            with_interval(after, 'accuracy', '{:.2%}'),
        ]
        cells += [f"{after['commonest']:.2%}"]
        table.add_row(', '.join(map(str, after['context'])), look_ahead_text(after['look_ahead_ms']), *cells)
    return table


def draw(model_file: Path, audio: str, folder: Path) -> None:
    """Draw what the model masks, whom it attends to and how it learned, into the folder's ``pictures``."""
    from nemo.collections.asr.parts.ssl_reports.figures import learning_curves
    from nemo.collections.asr.parts.ssl_reports.training_logs import read_curves

    demo_stages.say(f"Pictures in {folder / 'pictures'}")
    made_from = ['--model_path', model_file, '--audio_path', audio]
    try:
        learning_curves(read_curves(folder / 'run'))
        made_from += ['--logs', folder / 'run']
    except ValueError as error:  # such as a run too short to log any
        demo_stages.say(f'No learning curves: {error}')
    demo_stages.run('plot_contexts.py', *made_from, '--output', folder / 'pictures')
