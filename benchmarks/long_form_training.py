# SPDX-License-Identifier: Apache-2.0
"""Pre-train on cuts of ten minutes of a long recording: memory, time and loss of each step.

    python benchmarks/long_form_training.py --manifest speech.json                # batch 1, 17 layers of 256
    python benchmarks/long_form_training.py --manifest speech.json --steps 4 -- model.encoder.blockwise_attention=off

The recording is made of the manifest's utterances, repeated until it is long enough. The training script is that of the
examples with the hierarchical config; put further Hydra overrides after ``--``.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import numpy as np
import soundfile
from measure import GIVE_BACK, Quick
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / 'examples/asr/speech_pretraining/pretrain.py'
RATE = 16000


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--manifest', type=Path, required=True, help='a NeMo manifest of speech, 16 kHz')
    parser.add_argument('--output', type=Path, default=ROOT / 'outputs/long_form_training')
    parser.add_argument('--minutes', type=float, default=60.0, help='length of the recording')
    parser.add_argument('--cut_minutes', type=float, default=10.0)
    parser.add_argument('--steps', type=int, default=12)
    parser.add_argument('--layers', type=int, default=17, help='13 or more, as the layer contexts need')
    parser.add_argument('--d_model', type=int, default=256)
    parser.add_argument(
        '--quick', action=Quick, small=dict(minutes=0.2, cut_minutes=0.1, steps=2, layers=13, d_model=32)
    )
    parser.add_argument('overrides', nargs='*', help='Hydra overrides of the config')
    return parser.parse_args(argv)


def make_recording(options: argparse.Namespace) -> Path:
    """Write the recording and a manifest of its cuts; returns the manifest."""
    options.output.mkdir(parents=True, exist_ok=True)
    recording, wanted = options.output.resolve() / 'recording.wav', int(options.minutes * 60 * RATE)
    paths = [json.loads(line)['audio_filepath'] for line in options.manifest.read_text().splitlines() if line.strip()]
    with soundfile.SoundFile(recording, 'w', RATE, 1, 'PCM_16') as file:
        for path in cycle(paths):
            samples, rate = soundfile.read(options.manifest.parent / path, dtype='float32')
            if rate != RATE or samples.ndim != 1:
                raise SystemExit(f'{path} has {rate} samples a second; it must have {RATE}, in one channel')
            file.write(samples[: wanted - file.tell()])
            if file.tell() == wanted:
                break
    cuts = np.arange(0, options.minutes * 60, options.cut_minutes * 60)
    manifest = options.output.resolve() / 'cuts.json'
    entry = dict(audio_filepath=str(recording), duration=options.cut_minutes * 60, text='')
    manifest.write_text(''.join(json.dumps({**entry, 'offset': float(start)}) + '\n' for start in cuts))
    return manifest


def train(options: argparse.Namespace, manifest: Path) -> Path:
    """Run the training script; returns the folder of its logs.

    glibc returns what is freed, or the layers' memory is still held when the subsampling goes backward.
    """
    logs = options.output.resolve() / f'run-{len(list(options.output.glob("run-*")))}'
    overrides = [
        f'model.train_ds.manifest_filepath={manifest}',
        f'model.validation_ds.manifest_filepath={manifest}',
        f'model.train_ds.max_duration={options.cut_minutes * 60}',
        f'model.validation_ds.max_duration={options.cut_minutes * 60}',
        'model.train_ds.batch_size=1',
        'model.train_ds.num_workers=0',
        '~model.train_ds.batch_augmentor',
        'model.log_figures=false',
        f'model.encoder.n_layers={options.layers}',
        f'model.encoder.d_model={options.d_model}',
        'model.optim.lr=0.05',
        'model.optim.sched.warmup_steps=10',
        '~curriculum',  # its first ceiling would make all layers alike
        'seed=0',
        'trainer.accelerator=cpu',
        'trainer.devices=1',
        f'trainer.max_steps={options.steps}',
        'trainer.log_every_n_steps=1',
        'trainer.num_sanity_val_steps=0',
        '+trainer.limit_val_batches=0',
        'exp_manager.create_checkpoint_callback=false',
        f'+exp_manager.explicit_log_dir={logs}',
        *options.overrides,
    ]
    subprocess.run(
        [sys.executable, str(SCRIPT), '--config-name=nest_hierarchical_streaming', *overrides],
        env={**os.environ, **GIVE_BACK},
        check=True,
    )
    return logs


def scalars(logs: Path, name: str) -> list:
    """Return what was logged under a name, (clock, step, value) for each step."""
    file = next(logs.rglob('events.out.tfevents.*'))
    return EventAccumulator(str(file), size_guidance={'scalars': 0}).Reload().Scalars(name)


def main(argv=None) -> None:
    """Make the recording, train, print."""
    options = arguments(argv)
    logs = train(options, make_recording(options))
    losses, contexts = (scalars(logs, name) for name in ('train_loss', 'att_context_left'))
    kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print('| step | context | loss | seconds |\n| ---: | ---: | ---: | ---: |')
    for before, now, context in zip([None, *losses], losses, contexts):
        took = f'{now.wall_time - before.wall_time:.1f}' if before else ''
        print(f'| {now.step} | {context.value:.0f} | {now.value:.3f} | {took} |')
    print(f'{options.layers} layers of {options.d_model}, cuts of {options.cut_minutes:g} minutes')
    print(f'peak memory of the whole training process: {kilobytes * 1024 / 1e9:.2f} GB')


if __name__ == '__main__':
    main()
