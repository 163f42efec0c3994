# SPDX-License-Identifier: Apache-2.0
"""Run arms of the comparison: pre-train, fine-tune on more and less speech, and count phone errors; see protocol.md.

    python benchmarks/downstream/run.py --pretraining train.json tuning.json --validation validation.json \
        --tuning tuning.json --test test.json --all                     # whatever is missing, arm after arm
    ... --arm synchronised --seed 0                                     # one

All arms are to have the same manifests; those to fine-tune and test on have ``phones``. What is done is left alone,
and what was interrupted goes on: pre-training from its last checkpoint, a fine-tuning or a test from its beginning.
So the same command can be started again at any time, or twice at a time: each takes what nobody works on. A result,
ARM-SEED.json, is in --results when all of it is done, and not before.
"""

import argparse
import fcntl
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import arms
import calibration
import data
import phones
import torch
from settings import CONTEXTS, SEEDS, Settings, check_same

from nemo.utils.atomic_files import replacing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = ROOT / 'examples/asr/speech_pretraining'
CHECKPOINTS = 500  # steps of pre-training from one to the next
LONGEST = 120.0  # seconds of an utterance
FRAMES_OF_A_TARGET = 8  # of 10 ms
SETUP = 'data'  # the folder of what all arms share
ROUNDS = {
    'first': list(arms.ARMS),
    'refined': [f'{name}{arms.REFINED}' for name in ('synchronised', 'next_token', 'both')],
}


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for role in data.ROLES:
        parser.add_argument(f'--{role}', type=Path, nargs='+', required=True, help=f'NeMo manifests of the {role}')
    parser.add_argument('--arm', nargs='+', default=[], help='arms to run; behind one, -refined refines its targets')
    parser.add_argument('--seed', type=int, nargs='+', default=list(SEEDS))
    parser.add_argument('--all', action='store_true', help='all arms of the first round')
    parser.add_argument(
        '--work', type=Path, default=ROOT / 'benchmarks/results/downstream', help='for models and logs'
    )
    parser.add_argument('--results', type=Path, default=HERE / 'results', help='for the results, to be committed')
    Settings.add_arguments(parser)
    options = parser.parse_args(argv)
    options.arm += [name for name in ROUNDS['first'] if options.all and name not in options.arm]
    if not options.arm:
        parser.error('--arm or --all is needed')
    return options


def launch(script: Path, *words) -> None:
    """Run a script of the project in a process of its own, and end with its status if it fails."""
    environment = {'OMP_NUM_THREADS': '1', **os.environ}
    command = [sys.executable, str(script), *map(str, words)]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise SystemExit(status)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock on a file while the block runs; it is given back even if the process is killed.

    Args:
        path: of the file.
        wait: until another process has given it back; else the block gets False if one holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class Stages:
    """The stages of a folder; each leaves one file, whole or not at all, and the CPU seconds that it took.

    Args:
        folder: for the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, make: Callable[[Path], None]) -> Path:
        """Make a file, unless it is there.

        Args:
            name: of the file.
            make: makes it at the path that it is given.
        """
        path = self.folder / name
        if not path.exists():
            print(f'== {self.folder.name}: {name}', flush=True)
            before = _cpu_seconds()
            make(path)
            write_json(self.folder / 'seconds.json', {**self.seconds, name: round(_cpu_seconds() - before, 1)})
        return path

    @property
    def seconds(self) -> dict:
        """CPU seconds of each stage; of one that went on after an interruption, those of its last part."""
        path = self.folder / 'seconds.json'
        return json.loads(path.read_text()) if path.exists() else {}


def _cpu_seconds() -> float:
    """Return the CPU seconds, of all threads, that this process and those that it waited for have had."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def write_json(path: Path, value) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value) + '\n')


class Setup:
    """What all arms share: the joined speech, its statistics, and the masks; made once.

    Args:
        options: the command line.
        settings: the sizes.

    Raises:
        ValueError: naming what cannot be used.
    """

    def __init__(self, options: argparse.Namespace, settings: Settings):
        self.settings, self.folder = settings, (options.work / SETUP).resolve()
        with locked(options.work / 'setup.lock', wait=True):
            settings.claim(options.work)
            sources = {role: getattr(options, role) for role in data.ROLES}
            self.entries = data.prepare(sources, self.folder, settings.seconds, settings.fine_tuning_seconds)
            stages = Stages(self.folder)
            self.components = self.folder / 'components.npz'  # of the same pass, written before the statistics
            self.statistics = stages.run('feature_stats.yaml', self._make_statistics)
            self.masks = json.loads(stages.run('masks.json', self._calibrate).read_text())
            self._choose()

    def _make_statistics(self, path: Path) -> None:
        files = ['--manifest', self.manifest('pretraining'), '--output', path, '--pca', self.components]
        launch(SCRIPTS / 'compute_feature_stats.py', *files, '--combine_time_steps', FRAMES_OF_A_TARGET)

    def _calibrate(self, path: Path) -> None:
        lengths = torch.tensor([int(100 * entry['duration']) for entry in self.entries['pretraining']])
        write_json(path, calibration.calibrated(arms.MASKED, arms.REFERENCE, arms.SHORT, lengths))

    def _choose(self) -> None:
        """Divide the transcribed speech: what fine-tuning is validated on, and what it can learn from."""
        held_out = min(data.HELD_OUT, len(self.entries['tuning']) // 4)
        ordered = data.in_turn(self.entries['tuning'])
        self.tuning = ordered[: len(ordered) - held_out]
        data.write_manifest(self.manifest('held_out'), ordered[len(ordered) - held_out :])

    def manifest(self, name: str) -> Path:
        """Return where a manifest is."""
        return self.folder / f'{name}.json'


def train(script: Path, config: str, overrides: list[str], log: Path, model: Path) -> None:
    """Train by a script, or go on where it was, and put the ``.nemo`` of its last step in place.

    Args:
        script: to train by.
        config: its name.
        overrides: for Hydra.
        log: the folder of checkpoints and logs.
        model: where the file goes.
    """
    shared = [
        f"+exp_manager.explicit_log_dir='{log}'",
        'trainer.accelerator=cpu',
        'trainer.devices=1',
        '++trainer.enable_progress_bar=false',
        'trainer.num_sanity_val_steps=0',
        'trainer.log_every_n_steps=10',
        *(
            f'model.{part}.{key}'
            for part in ('train_ds', 'validation_ds')
            for key in ('num_workers=0', 'pin_memory=false')
        ),
    ]
    launch(script, f'--config-name={config}', *shared, *overrides)
    saved = max((log / 'checkpoints').glob('*.nemo'), key=os.path.getmtime, default=None)
    if saved is None:
        raise SystemExit(f'{script.name} left no .nemo file in {log}')
    saved.rename(model)


def validations(steps: int, every: int) -> list[str]:
    """Return the overrides that validate, and keep a checkpoint, after so many steps and after the last."""
    every = max(number for number in range(1, min(every, steps) + 1) if steps % number == 0)
    return [
        f'trainer.max_steps={steps}',
        f'trainer.val_check_interval={every}',
        '++trainer.check_val_every_n_epoch=null',
    ]


class Run:
    """One arm with one seed.

    Args:
        name: of the arm.
        seed: of everything that is drawn.
        setup: what all arms share.
        folder: for models and logs.

    Raises:
        ValueError: if there is no such arm.
    """

    def __init__(self, name: str, seed: int, setup: Setup, folder: Path):
        self.name, self.seed, self.setup, self.settings = name, seed, setup, setup.settings
        self.arm, self.stages = arms.find(name), Stages(folder.resolve())
        self.folder = self.stages.folder

    def result(self) -> dict:
        """Do what is missing, and return all that was found."""
        encoder = self._encoder()
        tuned = {minutes: self._fine_tune(encoder, minutes) for minutes in self.settings.minutes}
        scores = {f'{minutes:g}': self._score(model, minutes) for minutes, model in tuned.items()}
        test = self.setup.entries['test']
        return {
            'arm': self.name,
            'seed': self.seed,
            'settings': self.settings.as_dict(),
            'data': {role: data.digest(entries) for role, entries in self.setup.entries.items()},
            'test': {
                'utterances': [entry['utterance'] for entry in test],
                'speakers': [entry['speaker'] for entry in test],
                'phones': [len(entry['text']) for entry in test],
            },
            'errors': {minutes: found['errors'] for minutes, found in scores.items()},
            'live': scores[f'{self.settings.larger_minutes:g}']['live'],
            'masks': self.setup.masks.get(self.name.removesuffix(arms.REFINED)),
            'pretraining': logged(self.folder / 'pretraining') if self.arm.pretrained else None,
            'fine_tuning': {minutes: logged(self._log_of(float(minutes))) for minutes in scores},
            'seconds': self.stages.seconds,
            'versions': versions(),
        }

    def _encoder(self) -> Path:
        """Return the ``.nemo`` file with the encoder to fine-tune."""
        if not self.arm.pretrained:
            return self.stages.run('untrained.nemo', self._make_untrained)
        model = self.stages.run('pretrained.nemo', self._pretrain)
        return (
            self.stages.run('converted.nemo', lambda path: self._convert(model, path)) if self.arm.converted else model
        )

    def overrides(self) -> list[str]:
        """Return the overrides of pre-training but for those of :func:`train`."""
        steps, setup = self.settings.pretraining_steps, self.setup
        return [
            f"model.train_ds.manifest_filepath='{setup.manifest('pretraining')}'",
            f"model.validation_ds.manifest_filepath='{setup.manifest('validation')}'",
            f'model.train_ds.batch_size={self.settings.pretraining_batch}',
            *(f'model.{part}.max_duration={LONGEST}' for part in ('train_ds', 'validation_ds')),
            f"model.preprocessor.normalize='{setup.statistics}'",
            '+model.quantizer.projection=pca',
            f"+model.quantizer.projection_file='{setup.components}'",
            'model.log_figures=false',
            *arms.overrides(self.name, self.settings, self.seed, setup.masks),  # the last of two alike holds
            *validations(steps, CHECKPOINTS),
        ]

    def _pretrain(self, path: Path) -> None:
        script = SCRIPTS / 'hierarchical_streaming_nest.py'
        if self.arm.ignores_context:
            script = HERE / 'pretrain_context_free.py'
        train(script, arms.CONFIG, self.overrides(), self.folder / 'pretraining', path)

    def _make_untrained(self, path: Path) -> None:
        """Save the model that pre-training of the reference arm begins with."""
        words = [f'--output={path}', f'--config={arms.CONFIG}', *self.overrides()]
        launch(HERE / 'save_untrained.py', *words)

    def _convert(self, model: Path, path: Path) -> None:
        contexts = json.dumps([list(context) for context in CONTEXTS])
        files = ['--model_path', model, '--output', path, '--stats', self.setup.statistics]
        launch(SCRIPTS / 'convert_to_streaming.py', *files, '--contexts', contexts)

    def _log_of(self, minutes: float) -> Path:
        return self.folder / f'tuning-{minutes:g}'

    def _fine_tune(self, encoder: Path, minutes: float) -> Path:
        """Fine-tune on some minutes; the utterances of all steps are laid out in a manifest, for an equal order."""
        steps, batch = self.settings.fine_tuning_steps, self.settings.fine_tuning_batch

        def make(path: Path) -> None:
            manifest = self.folder / f'tuning-{minutes:g}.json'
            chosen = data.subset(self.setup.tuning, minutes)
            data.write_manifest(manifest, data.epochs(chosen, steps * batch, self.seed))
            shutil.rmtree(self._log_of(minutes), ignore_errors=True)  # of one that was interrupted
            made = [
                f'seed={self.seed}',
                f"init_from_nemo_model.pretrained.path='{encoder}'",
                f'model.labels=[{",".join(phones.CHARACTERS)}]',
                f"model.train_ds.manifest_filepath='{manifest}'",
                f"model.validation_ds.manifest_filepath='{self.setup.manifest('held_out')}'",
                f'model.train_ds.batch_size={batch}',
                'model.train_ds.shuffle=false',
                '+model.use_cer=true',  # of phones, in the logs
                f'model.train_ds.max_duration={LONGEST}',
                f'+model.encoder.att_context_seed={self.seed}',
                'model.spec_augment.freq_masks=0',
                'model.spec_augment.time_masks=0',
                'model.optim.lr=1e-3',
                f'model.optim.sched.warmup_steps={max(1, steps // 10)}',
                *validations(steps, steps),
            ]
            train(SCRIPTS / 'finetune_streaming.py', 'streaming_ctc', made, self._log_of(minutes), path)

        return self.stages.run(f'tuned-{minutes:g}.nemo', make)

    def _score(self, model: Path, minutes: float) -> dict:
        """Count the errors of a recogniser; live, too, for the larger of the two subsets."""

        def make(path: Path) -> None:
            import scoring

            recogniser, test = scoring.restore(model), self.setup.entries['test']
            found = scoring.score(recogniser, test)
            if minutes == self.settings.larger_minutes:
                number = self.settings.live_utterances
                found['live'] = scoring.score_live(recogniser, test, found, number)
            write_json(path, found)

        return json.loads(self.stages.run(f'scores-{minutes:g}.json', make).read_text())


def logged(folder: Path) -> dict:
    """Return what a training logged: of each loss the first and the last value, of what masks hide the mean.

    Args:
        folder: with the event files of all its parts.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
    found = {}
    for tag in events.Tags()['scalars']:
        values = list(
            {event.step: event.value for event in events.Scalars(tag)}.values()
        )  # steps done twice count once
        if tag.startswith('audit/'):
            found[tag] = sum(values) / len(values)
        elif 'loss' in tag or 'wer' in tag:
            found[tag] = [values[0], values[-1]]
    return found


def versions() -> dict:
    """Return the versions of what a result depends on."""
    packages = {'nemo': 'nemo_toolkit', 'torch': 'torch', 'project': 'nemo-streaming-ssl'}
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=False)
    found = {name: version(package) for name, package in packages.items()}
    return {**found, 'python': platform.python_version(), 'commit': commit.stdout.strip() or None}


def run_one(name: str, seed: int, setup: Setup, options: argparse.Namespace) -> Path | None:
    """Run one arm with one seed, unless it is done; returns its result, None if another process is at work on it.

    Raises:
        ValueError: if there is a result of other settings.
    """
    path, label = options.results / f'{name}-{seed}.json', f'{name}-{seed}'
    with locked(options.work / f'{label}.lock', wait=False) as free:
        if not free:
            print(f'== {label}: another process is at work on it', flush=True)
            return None
        if path.exists():
            check_same(json.loads(path.read_text())['settings'], setup.settings.as_dict(), path)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, Run(name, seed, setup, options.work / label).result())
        print(f'== {label}: wrote {path}', flush=True)
    return path


def main(argv=None) -> int:
    """Run what the command line asks for, seed by seed; returns the exit status."""
    options = arguments(argv)
    try:
        for name in options.arm:
            arms.find(name)
        setup = Setup(options, Settings.of(options))
        for seed in options.seed:  # of every arm first one seed: partial results compare, too
            for name in options.arm:
                run_one(name, seed, setup, options)
    except (ValueError, OSError) as error:
        print(f'run: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
