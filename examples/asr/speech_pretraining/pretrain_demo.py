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
    from make_speech_corpus import make_corpus

    folder = options.output / 'speech_corpus'
    say(f'Making a synthetic speech corpus in {folder}')
    seconds, _ = make_corpus(folder)
    say(', '.join(f'{split}: {length / 60:.1f} minutes' for split, length in seconds.items()))
    return {role: str(folder.resolve() / f'{role}_manifest.json') for role in ('train', 'validation', 'noise')}


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
        "trainer.check_val_every_n_epoch=2",  # each runs in three contexts and draws pictures
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
    statistics = [str(HERE / 'compute_feature_stats.py'), '--manifest', data['train']]
    run([*statistics, '--output', str(folder / 'feature_stats.yaml')])
    say(f"Training; TensorBoard logs are in {folder / 'run'}")
    script = [str(HERE / 'hierarchical_streaming_nest.py'), '--config-name', options.config]
    run([*script, *overrides_for(options, data, folder)])
    saved = sorted((folder / 'run' / 'checkpoints').glob('*.nemo'), key=os.path.getmtime)
    if not saved:
        raise SystemExit(f"pretrain_demo: the training left no .nemo file in {folder / 'run' / 'checkpoints'}")
    os.replace(saved[-1], model_file)
    return model_file


def run(command: list[str]) -> None:
    """Run a script of this folder in a fresh interpreter; ends this one with its status if it fails."""
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status:
        raise SystemExit(status)


def say(text: str) -> None:
    """Print a line that stands out between NeMo's."""
    print(f'== {text}', flush=True)


def report(options: argparse.Namespace, data: dict, folder: Path, model_file: Path) -> None:
    """Restore the model, print what it has learned beside an untrained one, and draw pictures of it."""
    # Imported here, for the corpus is made without waiting for NeMo.
    import lightning.pytorch as pl
    from evaluate_contexts import contexts_of, evaluate_models, write_json
    from learning_report import learning_table
    from rich.console import Console
    from streaming_inference_example import parity_line, stream_one

    from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

    say(f'Restoring {model_file}')
    trained = EncDecDenoiseMaskedTokenPredModel.restore_from(str(model_file), map_location='cpu')
    pl.seed_everything(SEED)  # as the training script does: the same initial weights
    untrained = EncDecDenoiseMaskedTokenPredModel(trained.cfg)
    models = {'start': untrained, 'end': trained}
    contexts = {name: contexts_of(model, 'all', name) for name, model in models.items()}
    results = evaluate_models(models, contexts, data['validation'], EVALUATION)
    write_json(folder / 'learned.json', results, vars(EVALUATION))
    console = Console(width=120 if not sys.stdout.isatty() else None)
    console.print(learning_table(*results))
    say(parity_line(stream_one(trained.eval(), first_audio(data['validation']))))
    draw(model_file, first_audio(data['validation']), folder)
    say(f"Model: {model_file}; figures: {folder / 'learned.json'}; tensorboard --logdir {folder / 'run'}")


def draw(model_file: Path, audio: str, folder: Path) -> None:
    """Draw what the model masks, whom it attends to and how it learned, into the folder's ``pictures``."""
    from plot_contexts import main as plot

    from nemo.collections.asr.parts.ssl_reports.figures import learning_curves
    from nemo.collections.asr.parts.ssl_reports.training_logs import read_curves

    say(f"Pictures in {folder / 'pictures'}")
    made_from = ['--model_path', str(model_file), '--audio_path', audio]
    try:
        learning_curves(read_curves(folder / 'run'))
        made_from += ['--logs', str(folder / 'run')]
    except ValueError as error:  # such as a run too short to log any
        say(f'No learning curves: {error}')
    status = plot([*made_from, '--output', str(folder / 'pictures')])
    if status:
        raise SystemExit(status)


def first_audio(manifest: str) -> str:
    """Return the audio file of a manifest's first entry."""
    from nemo.collections.common.parts.preprocessing.manifest import get_full_path

    with open(manifest, encoding='utf-8') as lines:
        return get_full_path(json.loads(lines.readline())['audio_filepath'], manifest_file=manifest)


def main(argv=None) -> None:
    """Make data, train, restore, report."""
    options = arguments(argv)
    data = data_of(options)
    folder = run_folder(options, data)
    say(f'Everything of this run is in {folder}')
    model_file = train(options, data, folder)
    report(options, data, folder, model_file)


if __name__ == '__main__':
    main()
