# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Pre-train a tiny streaming encoder from nothing, restore it, and say what it has learned. ``make pretrain`` runs it.

    python pretrain_demo.py [--manifest train.json --validation-manifest validation.json] [--output outputs]

Without manifests it makes a synthetic corpus first. Each choice of data and settings has a folder of its own under
``--output``; started again after an interruption it goes on from the last checkpoint there.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from script_tools import manifest_seconds, require_patches

HERE = Path(__file__).resolve().parent
CONFIG = 'nest_hierarchical_streaming_tiny'
SEED = 0
EVALUATION = argparse.Namespace(
    mask_context=None, draws=2, seed=SEED, resamples=1000, confidence=0.95, batch_size=8, num_workers=0
)


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--manifest', help='train manifest; without it a synthetic corpus is made')
    parser.add_argument('--validation-manifest', help='needed with --manifest')
    parser.add_argument('--noise-manifest', help='noise to mix in; optional')
    parser.add_argument('--output', default='outputs', type=Path, help='where everything goes')
    parser.add_argument('--config', default=CONFIG, help='name of a config in examples/asr/conf/ssl/nest')
    parser.add_argument('overrides', nargs='*', help='Hydra overrides, such as trainer.max_steps=2000')
    options = parser.parse_args(argv)
    if bool(options.manifest) != bool(options.validation_manifest):
        parser.error('--manifest and --validation-manifest (MANIFEST and VAL_MANIFEST) go together')
    return options


def data_of(options: argparse.Namespace) -> dict:
    """Return the manifests to use, by role, after making the synthetic corpus if there are none."""
    if options.manifest:
        given = (options.manifest, options.validation_manifest, options.noise_manifest)
        return dict(zip(('train', 'validation', 'noise'), [path and str(Path(path).resolve()) for path in given]))
    folder = options.output / 'speech_corpus'
    say(f'Making a synthetic speech corpus in {folder}')
    run('make_speech_corpus.py', '--output', folder, stdout=subprocess.DEVNULL)
    data = {role: str(folder.resolve() / f'{role}_manifest.json') for role in ('train', 'validation', 'noise')}
    say(', '.join(f'{role}: {manifest_seconds(path) / 60:.1f} minutes' for role, path in data.items()))
    return data


def run_folder(options: argparse.Namespace, data: dict) -> Path:
    """Return the folder of this choice of data and settings, made if need be."""
    settings = {
        'data': data,
        'config': options.config,
        'overrides': options.overrides,
        'nemo': version('nemo_toolkit'),
    }
    settings['manifests'] = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in data.values() if path]
    text = json.dumps(settings, indent=2, sort_keys=True)
    folder = options.output / f"pretrain-{settings['nemo']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'settings.json').write_text(text)
    return folder


def overrides_for(options: argparse.Namespace, data: dict, folder: Path) -> list[str]:
    """Return the Hydra overrides of the training run."""
    log_dir = folder.resolve() / 'run'
    noise = data['noise'] or 'null'
    return [
        f"model.train_ds.manifest_filepath='{data['train']}'",
        f"model.train_ds.noise_manifest={noise if noise == 'null' else repr(noise)}",
        f"model.validation_ds.manifest_filepath='{data['validation']}'",
        f"model.preprocessor.normalize='{folder.resolve() / 'feature_stats.yaml'}'",
        f"seed={SEED}",
        "trainer.check_val_every_n_epoch=2",  # each runs in several contexts and draws pictures
        f"+exp_manager.explicit_log_dir='{log_dir}'",
        *options.overrides,
    ]


def train(options: argparse.Namespace, data: dict, folder: Path) -> Path:
    """Train, or go on training; returns the ``.nemo`` file."""
    model_file = folder / 'model.nemo'
    if model_file.exists():
        say(f'{model_file} is there already: no training (remove {folder} to train anew)')
        return model_file
    say('Computing the feature statistics of the corpus')
    run('compute_feature_stats.py', '--manifest', data['train'], '--output', folder / 'feature_stats.yaml')
    say(f"Training; TensorBoard logs are in {folder / 'run'}")
    overrides = overrides_for(options, data, folder)
    run('hierarchical_streaming_nest.py', '--config-name', options.config, *overrides)
    saved = sorted((folder / 'run' / 'checkpoints').glob('*.nemo'), key=os.path.getmtime)
    if not saved:
        raise SystemExit(f"pretrain_demo: the training left no .nemo file in {folder / 'run' / 'checkpoints'}")
    os.replace(saved[-1], model_file)
    return model_file


def run(script: str, *arguments, **streams) -> None:
    """Run a script of this folder in a fresh interpreter; if it fails, end this one with the same status.

    Args:
        script: file name of the script.
        arguments: the command line; anything that ``str`` turns into its words.
        streams: ``stdout`` and so on, as ``subprocess.run`` takes them.
    """
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    status = subprocess.run(command, check=False, **streams).returncode
    if status:
        raise SystemExit(status)


def say(text: str) -> None:
    """Print a line that stands out between NeMo's."""
    print(f'== {text}', flush=True)


def report(options: argparse.Namespace, data: dict, folder: Path, model_file: Path) -> None:
    """Restore the model, print what it has learned beside an untrained one, and draw pictures of it."""
    # Imported here, for the corpus is made without waiting for NeMo.
    import lightning.pytorch as pl
    from evaluation_tools import contexts_of, evaluate_models, reasons_of, write_results
    from rich.console import Console
    from streaming_tools import chunk_seconds, parity_line, stream_one, streamable_contexts

    from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

    say(f'Restoring {model_file}')
    trained = EncDecDenoiseMaskedTokenPredModel.restore_from(str(model_file), map_location='cpu')
    pl.seed_everything(SEED)  # as the training script does: the same initial weights
    untrained = EncDecDenoiseMaskedTokenPredModel(trained.cfg)
    models = {'start': untrained, 'end': trained}
    contexts = {name: contexts_of(model, 'all', name) for name, model in models.items()}
    results = evaluate_models(models, contexts, data['validation'], EVALUATION)
    write_results(folder / 'learned.json', results, vars(EVALUATION))
    console = Console(width=120 if not sys.stdout.isatty() else None)
    console.print(learning_table(*results))
    for reason in reasons_of(results[1]):
        say(f'Start and end cannot be compared in {reason}')
    for context in streamable_contexts(trained.eval()):
        say(
            parity_line(stream_one(trained, first_audio(data['validation']), chunk_seconds(trained, context), context))
        )
    draw(model_file, first_audio(data['validation']), folder)
    say(f"Model: {model_file}; figures: {folder / 'learned.json'}; tensorboard --logdir {folder / 'run'}")


def learning_table(start: dict, end: dict):
    """Lay out the results of :func:`evaluate_models` for a model before and after its training."""
    from evaluation_tools import with_interval
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
    columns = ['loss at start', 'at end', 'accuracy at start', 'at end', 'perplexity at end', 'always the commonest']
    for name in columns:
        table.add_column(name, justify='right')
    for before, after in zip(start['contexts'], end['contexts'], strict=True):
        cells = [after['part']] * (not masked_only)
        cells += [f"{before['loss']:.3f}", with_interval(after, 'loss', '{:.3f}')]
        cells += [f"{before['accuracy']:.2%}", with_interval(after, 'accuracy', '{:.2%}')]
        cells += [f"{after['perplexity']:.1f}", f"{after['commonest']:.2%}"]
        table.add_row(', '.join(map(str, after['context'])), look_ahead_text(after['look_ahead_ms']), *cells)
    return table


def draw(model_file: Path, audio: str, folder: Path) -> None:
    """Draw what the model masks, whom it attends to and how it learned, into the folder's ``pictures``."""
    from nemo.collections.asr.parts.ssl_reports.figures import learning_curves
    from nemo.collections.asr.parts.ssl_reports.training_logs import read_curves

    say(f"Pictures in {folder / 'pictures'}")
    made_from = ['--model_path', model_file, '--audio_path', audio]
    try:
        learning_curves(read_curves(folder / 'run'))
        made_from += ['--logs', folder / 'run']
    except ValueError as error:  # such as a run too short to log any
        say(f'No learning curves: {error}')
    run('plot_contexts.py', *made_from, '--output', folder / 'pictures')


def first_audio(manifest: str) -> str:
    """Return the audio file of a manifest's first entry."""
    from nemo.collections.common.parts.preprocessing.manifest import get_full_path

    with open(manifest, encoding='utf-8') as lines:
        return get_full_path(json.loads(lines.readline())['audio_filepath'], manifest_file=manifest)


def main(argv=None) -> None:
    """Make data, train, restore, report."""
    options = arguments(argv)
    require_patches(__file__)
    data = data_of(options)
    folder = run_folder(options, data)
    say(f'Everything of this run is in {folder}')
    model_file = train(options, data, folder)
    report(options, data, folder, model_file)


if __name__ == '__main__':
    main()
