# SPDX-License-Identifier: Apache-2.0
"""Pre-train with each objective and kind of targets; compare losses with the unigram entropy.

    python benchmarks/objectives.py --train train.json more.json --validation validation.json --output objectives

Each arm is a run of pretrain.py in a folder of its own under --output. If you interrupt the script, run it again: it
continues, and skips complete arms. It writes OUTPUT/objectives.json and a plot; docs/objectives.md has the table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measure import Quick
from tqdm import tqdm

from nemo.utils.atomic_files import write_text

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / 'examples/asr/speech_pretraining'
CONFIG = 'nest_next_token_streaming_tiny'
OBJECTIVES = ('masked', 'next_token', 'both')
TARGETS = ('random', 'pca')
SEED = 0


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--train', type=Path, nargs='+', required=True, help='NeMo manifests to train on')
    parser.add_argument('--validation', type=Path, nargs='+', required=True, help='NeMo manifests to evaluate on')
    parser.add_argument('--objectives', nargs='+', choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument('--targets', nargs='+', choices=TARGETS, default=list(TARGETS))
    parser.add_argument('--classes', type=int, default=512)
    parser.add_argument('--steps', type=int, default=3000)
    parser.add_argument('--config', default=CONFIG, help='in examples/asr/conf/ssl/nest')
    parser.add_argument('--output', type=Path, default=Path('benchmarks/results/objectives'))
    parser.add_argument(
        '--quick', action=Quick, small=dict(objectives=['next_token'], targets=['random'], steps=2, classes=32)
    )
    return parser.parse_args(argv)


def run(script: str, *words) -> None:
    """Run one of the project's scripts, and end with its status if it fails."""
    status = subprocess.run([sys.executable, SCRIPTS / script, *map(str, words)], check=False).returncode
    if status:
        raise SystemExit(status)


def paths(manifests) -> str:
    """Return manifests as a Hydra list."""
    return '[' + ','.join(f"'{path.resolve()}'" for path in manifests) + ']'


def prepare(options: argparse.Namespace) -> tuple[Path, Path]:
    """Compute the statistics and the principal components of the training speech, unless they exist."""
    statistics, components = options.output / 'feature_stats.yaml', options.output / 'components.npz'
    if not (statistics.exists() and components.exists()):
        options.output.mkdir(parents=True, exist_ok=True)
        manifests = [path.resolve() for path in options.train]
        run('compute_feature_stats.py', '--manifest', *manifests, '--output', statistics, '--pca', components)
    return statistics, components


def overrides(options: argparse.Namespace, objective: str, targets: str, folder: Path, files) -> list[str]:
    """Return the Hydra overrides of an arm."""
    statistics, components = files
    made = [
        f'model.train_ds.manifest_filepath={paths(options.train)}',
        f'model.validation_ds.manifest_filepath={paths(options.validation[:1])}',
        f"model.preprocessor.normalize='{statistics.resolve()}'",
        f'model.objective={objective}',
        f'model.num_classes={options.classes}',
        f'trainer.max_steps={options.steps}',
        f'seed={SEED}',
        f"+exp_manager.explicit_log_dir='{folder.resolve() / 'run'}'",
        'model.log_figures=false',
        'trainer.enable_progress_bar=false',
    ]
    if targets == 'pca':
        made += ['+model.quantizer.projection=pca', f"+model.quantizer.projection_file='{components.resolve()}'"]
    return made


def train(options: argparse.Namespace, objective: str, targets: str, files) -> Path:
    """Train an arm, or go on training it; returns its ``.nemo`` file."""
    folder = options.output / f'{objective}-{targets}'
    model = folder / 'model.nemo'
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run(
            'pretrain.py',
            '--config-path=../conf/ssl/nest',
            f'--config-name={options.config}',
            *overrides(options, objective, targets, folder, files),
        )
        saved = max((folder / 'run' / 'checkpoints').glob('*.nemo'), key=lambda path: path.stat().st_mtime)
        saved.rename(model)
    return model


def evaluate(options: argparse.Namespace, model: Path) -> dict[str, dict]:
    """Evaluate an arm on each validation manifest, once; return what evaluate_contexts.py wrote."""
    results = {}
    for manifest in options.validation:
        found = model.with_name(f'{manifest.stem}.json')
        if not found.exists():
            run('evaluate_contexts.py', '--model', model, '--manifest', manifest, '--output', found)
        results[manifest.stem] = json.loads(found.read_text())
    return results


def figures_of(evaluated: dict) -> list[dict]:
    """Return what evaluate_contexts.py found, a row for each context and part of the objective."""
    model = evaluated['models'][0]
    return [{**row, 'codebook': model['codebook']['perplexity']} for row in model['contexts']]


def parts_of(results: list[dict]) -> list[str]:
    """Return the parts of all objectives, without the sum over horizons."""
    rows = (row for result in results for evaluated in result['evaluated'].values() for row in figures_of(evaluated))
    return sorted({row['part'] for row in rows} - {'next'})


def table(results: list[dict]) -> str:
    """Lay out how far below the unigram entropy each part came, from the worst context to the best."""
    parts = parts_of(results)
    rows = [
        '| speech | objective | targets | codebook perplexity | unigram entropy | ' + ' | '.join(parts) + ' |',
        '| --- | --- | --- | ---: | ---: |' + ' --- |' * len(parts),
    ]
    for result in results:
        for speech, evaluated in result['evaluated'].items():
            found = figures_of(evaluated)
            cells = [speech, result['objective'], result['targets'], f"{found[0]['codebook']:.0f}"]
            cells.append(f"{found[0]['unigram_entropy']:.2f}")
            for part in parts:
                below = [row['unigram_entropy'] - row['loss'] for row in found if row['part'] == part]
                cells.append(f'{min(below):+.2f} to {max(below):+.2f}' if below else '')
            rows.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)


def plot(results: list[dict], path: Path) -> None:
    """Draw how far below the unigram entropy each part of each arm came, in its contexts."""
    from matplotlib.figure import Figure

    speeches = list(results[0]['evaluated'])
    figure = Figure(figsize=(9, 3.2 * len(speeches)), layout='constrained')
    axes = figure.subplots(len(speeches), 1, squeeze=False)[:, 0]
    for axis, speech in zip(axes, speeches):
        labels = []
        for result in results:
            found = figures_of(result['evaluated'][speech])
            for part in dict.fromkeys(row['part'] for row in found if row['part'] != 'next'):
                below = [row['unigram_entropy'] - row['loss'] for row in found if row['part'] == part]
                axis.plot([len(labels)] * len(below), below, 'o', alpha=0.6, color='C0' if part == 'masked' else 'C1')
                labels.append(f"{result['objective']}, {result['targets']}: {part}")
        axis.set_xticks(range(len(labels)), labels, rotation=60, ha='right', fontsize=7)
        axis.axhline(0, color='black', linewidth=0.8)
        axis.set_ylabel('nats below\nunigram entropy')
        axis.set_title(f'{speech}: a dot for each context', fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv=None) -> None:
    """Train and evaluate every arm, print the table, and write the results."""
    options = arguments(argv)
    files = prepare(options)
    arms = [(objective, targets) for targets in options.targets for objective in options.objectives]
    results = []
    for objective, targets in tqdm(arms, desc='arms', unit='arm'):
        model = train(options, objective, targets, files)
        results.append({'objective': objective, 'targets': targets, 'evaluated': evaluate(options, model)})
        write_text(options.output / 'objectives.json', json.dumps(results, indent=1))  # after each arm: they take long
        plot(results, options.output / 'objectives.png')
    print(table(results))
    print(f"Wrote {options.output / 'objectives.json'} and {options.output / 'objectives.png'}")


if __name__ == '__main__':
    main()
