# SPDX-License-Identifier: Apache-2.0
"""Run the comparison: pre-train encoders and judge them by frozen probes; see protocol.md.

    python benchmarks/downstream/run.py --speech FOLDER            # whatever is missing, in the order of the protocol
    ... --arm following-40 --kind causal --seed 0                  # some of it
    ... --quick                                                    # all code in seconds, on sizes that show nothing

The folder has the manifests ``train``, ``validation``, ``speechocean762_train`` and ``speechocean762_test``. If you interrupt
the command, run it again. You can start it several times at once: each process takes runs that no other works on.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from arms import ARMS, FEATURES, KINDS, RUNNABLE, SEEDS
from data import Speech
from distance import loss_by_distance
from finetune import fine_tune
from phones import PHONES
from pretrain import FACTOR, Recipe, build, pretrain, set_masks
from tables import append, label_of, locked, rows_of

from nemo.collections.asr.parts.ssl_reports.probe import ProbeSettings, layer_outputs, probe_errors
from nemo.utils.atomic_files import write_text

HERE = Path(__file__).resolve().parent
PROBES = ('kind', 'arm', 'seed', 'step', 'context', 'probe_seed', 'errors')
TRAININGS = (
    'kind',
    'arm',
    'seed',
    'step',
    'train_loss',
    'validation_loss',
    'block',
    'masked_share',
    'mean_run',
    'seconds',
)
DISTANCES = ('kind', 'arm', 'seed', 'context', 'part', 'left', 'right', 'frames', 'nats_below')
TUNINGS = ('kind', 'arm', 'seed', 'step', 'context', 'errors')
CURVE = ('following-40', 'next')  # arms that show the noise, with seed 0: more probe seeds, and earlier checkpoints
PROBE_SEEDS = 3
FIRST = ('stock-40', 'following-40', 'next', 'random', 'stock-short')
SECOND = ('supervised', 'stock-16', 'following-16')


class Cell(NamedTuple):
    """One encoder of the grid."""

    kind: str
    arm: str
    seed: int
    noise: bool = False
    """Whether to fit the probes that show the instrument's noise, too."""

    @property
    def label(self) -> str:
        """Its folder."""
        return f'{self.kind}-{self.arm}-{self.seed}'


def order() -> list[Cell]:
    """Return all cells, those that decide most first; see protocol.md."""
    rest = [name for name in RUNNABLE if name not in (FEATURES, *FIRST, *SECOND)]
    cells = []
    for seed in SEEDS:
        cells += [Cell(kind, name, seed) for kind in KINDS for name in FIRST]
        if seed == 0:
            cells += [Cell('causal', FEATURES, 0), *(Cell('causal', name, 0, noise=True) for name in CURVE)]
            cells += [Cell(kind, SECOND[0], 0) for kind in KINDS]
    cells += [
        Cell(kind, name, seed) for seed in SEEDS for kind in KINDS for name in SECOND if (name, seed) != (SECOND[0], 0)
    ]
    return cells + [Cell(kind, name, seed) for kind in KINDS for seed in SEEDS for name in rest]


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--speech', type=Path, required=True, help='folder of the manifests')
    parser.add_argument('--arm', nargs='+', choices=RUNNABLE, default=RUNNABLE)
    parser.add_argument('--kind', nargs='+', choices=list(KINDS), default=list(KINDS))
    parser.add_argument('--seed', type=int, nargs='+', default=list(SEEDS))
    parser.add_argument(
        '--tune', action='store_true', help='also fine-tune to convergence the encoders that are there'
    )
    parser.add_argument('--work', type=Path, default=HERE.parent / 'results/downstream', help='for encoders')
    parser.add_argument('--results', type=Path, default=HERE / 'results', help='for the CSV files, to be committed')
    parser.add_argument('--quick', action='store_true', help='tiny sizes that only test the code')
    return parser.parse_args(argv)


def sizes(quick: bool) -> tuple[Recipe, ProbeSettings, dict]:
    """Return the sizes of pre-training, of probes and of the speech."""
    if not quick:
        return Recipe(), ProbeSettings(), {}
    recipe = Recipe(layers=1, width=16, classes=16, steps=4, crop_frames=160, warmup_steps=1)
    return recipe, ProbeSettings(steps=3, batch_size=2, hidden=8), dict(minutes=0.1, tested=4)


class Judge:
    """Fits probes on encoders and writes their errors.

    Args:
        speech: of the comparison.
        settings: of a probe.
        path: the CSV file.
    """

    def __init__(self, speech: Speech, settings: ProbeSettings, path: Path):
        self.speech, self.settings, self.path = speech, settings, path
        self.parts = {'train': speech.probe, 'test': speech.test}
        self.labels = {part: [one.labels for one in found] for part, found in self.parts.items()}
        lists = {'(phones)': map(len, self.labels['test']), '(speakers)': [one.speaker for one in speech.test]}
        with locked(path.with_suffix('.begin'), wait=True):
            if not path.exists():
                append(path, PROBES, [('', name, '', '', '', '', label_of(found)) for name, found in lists.items()])
        path.with_suffix('.begin').unlink(missing_ok=True)

    def judge(self, cell: Cell, encoder, step: int, probe_seeds: range) -> None:
        """Fit the probes of one encoder that have no row yet, in each context that is judged."""
        done = {tuple(row[key] for key in PROBES[:-1]) for row in rows_of(self.path)}
        for context in KINDS[cell.kind].judged[: None if encoder is not None else 1]:
            cached = {}
            for probe_seed in probe_seeds:
                row = (*cell[:3], step, label_of(context), probe_seed)
                if tuple(map(str, row)) in done:
                    continue
                if not cached:
                    cached = {part: self.outputs(part, encoder, context) for part in self.parts}
                settings = ProbeSettings(**{**vars(self.settings), 'seed': probe_seed})
                errors, _ = probe_errors(cached.__getitem__, self.labels, len(PHONES), settings)
                append(self.path, PROBES, [(*row, label_of(errors))])
                rate = 100 * sum(errors) / sum(map(len, self.labels['test']))
                print(f'{cell.label}: step, context and probe seed {row[3:]}: {rate:.2f} %', flush=True)

    def outputs(self, part: str, encoder, context) -> list[torch.Tensor]:
        """Return the layer outputs of a part's utterances; without an encoder, their features as one layer."""
        utterances = self.parts[part]
        if encoder is not None:
            return layer_outputs(encoder, self.speech.batches(utterances), context)
        features = [self.speech.batch([one.features])[0][0].half() for one in utterances]
        return [each[:, : each.shape[1] // FACTOR * FACTOR].t().reshape(-1, 1, 80 * FACTOR) for each in features]


def run_cell(cell: Cell, speech: Speech, recipe: Recipe, settings: ProbeSettings, options: argparse.Namespace) -> None:
    """Do what is missing of one cell, unless another process is at work on it."""
    with locked(options.work / f'{cell.label}.lock', wait=False) as free:
        if not free:
            return
        folder, probes = options.work / cell.label, options.results / 'probe.csv'
        judge, is_trained = Judge(speech, settings, probes), (folder / 'log.json').exists()
        if cell.arm == FEATURES:
            judge.judge(cell, None, 0, range(1))
            return
        if not is_trained:
            if len({row['context'] for row in own_rows(cell, probes)}) == len(KINDS[cell.kind].judged):
                return  # it ran on another machine
            folder.mkdir(parents=True, exist_ok=True)
            log = pretrain(cell.arm, cell.kind, cell.seed, speech, recipe, folder)
            if not own_rows(cell, options.results / 'pretraining.csv'):
                append(options.results / 'pretraining.csv', TRAININGS, training_rows(cell, log))
            write_text(folder / 'log.json', json.dumps(log))
        steps = sorted(int(path.stem.split('-')[1]) for path in folder.glob('encoder-*.pt'))
        encoder = build('random', cell.kind, cell.seed, recipe).encoder
        for step in reversed(steps if cell.noise else steps[-1:]):
            encoder.load_state_dict(torch.load(folder / f'encoder-{step}.pt'))
            judge.judge(cell, encoder, step, range(PROBE_SEEDS if cell.noise and step == steps[-1] else 1))
        write_distances(cell, speech, recipe, folder, options.results / 'distance.csv')
        if options.tune and cell.arm in FIRST and not cell.noise:
            write_tuning(cell, encoder, speech, recipe, options)


def own_rows(cell: Cell, path: Path) -> list[dict]:
    """Return the rows of a CSV file that are of a cell."""
    return [row for row in rows_of(path) if (row['kind'], row['arm'], row['seed']) == tuple(map(str, cell[:3]))]


def write_distances(cell: Cell, speech: Speech, recipe: Recipe, folder: Path, path: Path) -> None:
    """Write the loss by distance of a model that predicts tokens in these contexts, unless it is there."""
    arm = ARMS[cell.arm]
    predicts = arm.objective not in (None, 'ctc') and not arm.offline
    if not (predicts and (folder / 'final.pt').exists()) or own_rows(cell, path):
        return
    model = build(cell.arm, cell.kind, cell.seed, recipe).eval()
    set_masks(model, cell.arm, cell.kind, cell.seed, recipe)
    model.load_state_dict(torch.load(folder / 'final.pt', weights_only=False)['model'], strict=False)
    rows = []
    for context in KINDS[cell.kind].judged:
        found = loss_by_distance(model, speech.batches(speech.validation, size=5), context)
        for distance, (frames, below) in sorted(found.items()):
            rows.append((*cell[:3], label_of(context), *distance, frames, f'{below:.4f}'))
    append(path, DISTANCES, rows)


def write_tuning(cell: Cell, encoder, speech: Speech, recipe: Recipe, options: argparse.Namespace) -> None:
    """Write what fine-tuning an encoder to convergence gave, unless it is there."""
    path, looks = options.results / 'finetuning.csv', dict(every=2, most=4) if options.quick else {}
    if not own_rows(cell, path):
        step, errors = fine_tune(encoder, recipe.width, speech, cell.kind, cell.seed, **looks)
        rows = [(*cell[:3], step, label_of(context), label_of(counts)) for context, counts in errors.items()]
        append(path, TUNINGS, rows)


def training_rows(cell: Cell, log: dict) -> list[tuple]:
    """Return the rows of a pre-training: its loss each 100 steps, the validation loss where there is one."""
    validation = {step: f'{loss:.4f}' for step, loss in log['validation'].items()}
    rows = [(*cell[:3], step, f'{loss:.4f}', validation.get(step, '')) for step, loss in log['loss']]
    masks = [round(log[key], 4) if key in log else '' for key in ('block', 'masked_share', 'mean_run')]
    rows[-1:] = [(*row, *masks, round(log['seconds'])) for row in rows[-1:]]
    return rows


def main(argv=None) -> int:
    """Run by the command line; return the exit status."""
    options = arguments(argv)
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    names = {'pretraining': ('train', 'speechocean762_train'), 'validation': ('validation',)}
    names.update(probe=('speechocean762_train',), test=('speechocean762_test',))
    manifests = {role: [options.speech / f'{name}_manifest.json' for name in found] for role, found in names.items()}
    recipe, settings, speech_sizes = sizes(options.quick)
    try:
        options.work.mkdir(parents=True, exist_ok=True)
        options.results.mkdir(parents=True, exist_ok=True)
        with locked(options.work / 'features.lock', wait=True):
            speech = Speech.load(manifests, options.work / 'features.pt', **speech_sizes)
        for cell in order():
            if cell.arm in options.arm and cell.kind in options.kind and cell.seed in options.seed:
                run_cell(cell, speech, recipe, settings, options)
    except (ValueError, OSError) as error:
        print(f'run: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
