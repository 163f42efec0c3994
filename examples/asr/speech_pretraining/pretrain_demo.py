# SPDX-License-Identifier: Apache-2.0
"""Pre-train a tiny streaming encoder from nothing, say what it has learned, and make a recogniser of it.

    python pretrain_demo.py [--manifest train.json --validation-manifest validation.json] [--output outputs]

``make pretrain`` runs it. Without manifests it makes a synthetic corpus first. A recogniser of characters is fine-tuned
twice on a few minutes of the transcripts, from the pre-trained encoder and from scratch; where the manifests have no
``text`` it is left out. Each choice of data and settings has a folder of its own under
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

import demo_stages
from demo_stages import say
from script_tools import manifest_seconds, require_patches

CONFIG = 'nest_next_token_demo'
SEED = 0
RECOGNISER_STEPS = 110


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--manifest', help='train manifest; without it a synthetic corpus is made')
    parser.add_argument('--validation-manifest', help='needed with --manifest')
    parser.add_argument('--noise-manifest', help='noise to mix in; optional')
    parser.add_argument('--output', default='outputs', type=Path, help='where everything goes')
    parser.add_argument('--config', default=CONFIG, help='name of a config in examples/asr/conf/ssl/nest')
    parser.add_argument(
        '--recogniser-steps', type=int, default=RECOGNISER_STEPS, help='of fine-tuning, twice; 0 leaves it out'
    )
    parser.add_argument('overrides', nargs='*', help='Hydra overrides, such as trainer.max_steps=2000')
    options = parser.parse_args(argv)
    if bool(options.manifest) != bool(options.validation_manifest):
        parser.error('--manifest and --validation-manifest (MANIFEST and VAL_MANIFEST) go together')
    if options.recogniser_steps < 0:
        parser.error(f'--recogniser-steps is {options.recogniser_steps}; it must be 0 or more')
    return options


def data_of(options: argparse.Namespace) -> dict:
    """Return the manifests to use, by role, after making the synthetic corpus if there are none."""
    if options.manifest:
        given = (options.manifest, options.validation_manifest, options.noise_manifest)
        return dict(zip(('train', 'validation', 'noise'), [path and str(Path(path).resolve()) for path in given]))
    folder = options.output / 'speech_corpus'
    say(f'Making a synthetic speech corpus in {folder}')
    demo_stages.run('make_speech_corpus.py', '--output', folder, stdout=subprocess.DEVNULL)
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
    partial = folder / 'settings.json.partial'  # nemo.utils.atomic_files would have to wait for NeMo
    partial.write_text(text)
    os.replace(partial, folder / 'settings.json')
    return folder


def overrides_for(options: argparse.Namespace, data: dict, folder: Path) -> list[str]:
    """Return the Hydra overrides of the training run."""
    noise = data['noise'] or 'null'
    return [
        f"model.train_ds.manifest_filepath='{data['train']}'",
        f"model.train_ds.noise_manifest={noise if noise == 'null' else repr(noise)}",
        f"model.validation_ds.manifest_filepath='{data['validation']}'",
        f"model.preprocessor.normalize='{folder.resolve() / 'feature_stats.yaml'}'",
        f"seed={SEED}",
        "trainer.val_check_interval=50",  # steps; each validation runs in several contexts and draws pictures
        "trainer.check_val_every_n_epoch=null",
        *options.overrides,
    ]


def train(options: argparse.Namespace, data: dict, folder: Path) -> Path:
    """Train, or go on training; returns the ``.nemo`` file."""
    model_file = folder / 'model.nemo'
    if model_file.exists():
        say(f'{model_file} is there already: no training (remove {folder} to train anew)')
        return model_file
    say('Computing the feature statistics of the corpus')
    demo_stages.run('compute_feature_stats.py', '--manifest', data['train'], '--output', folder / 'feature_stats.yaml')
    say(f"Training; TensorBoard logs are in {folder / 'run'}")
    overrides = overrides_for(options, data, folder)
    demo_stages.train('hierarchical_streaming_nest.py', options.config, overrides, folder / 'run', model_file)
    return model_file


def report(options: argparse.Namespace, data: dict, folder: Path, model_file: Path) -> None:
    """Restore the model, print and draw what it has learned, and make a recogniser of it."""
    # Imported here, for the corpus is made without waiting for NeMo.
    import demo_recogniser
    import demo_report
    from rich.console import Console

    from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

    say(f'Restoring {model_file}')
    trained = EncDecDenoiseMaskedTokenPredModel.restore_from(str(model_file), map_location='cpu')
    console = Console(width=120 if not sys.stdout.isatty() else None)
    results, audio = demo_report.evaluate(trained, data['validation']), first_audio(data['validation'])
    demo_report.show(results, console)
    demo_report.show_parity(trained, audio)
    demo_report.draw(model_file, audio, folder)
    steps = options.recogniser_steps
    rates = demo_recogniser.compare(data, folder / f'recogniser-{steps}-steps', model_file, steps, console)
    demo_report.write_learned(folder / 'learned.json', results, rates)
    say(f"Model: {model_file}; figures: {folder / 'learned.json'}; tensorboard --logdir {folder / 'run'}")


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
