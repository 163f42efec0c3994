# SPDX-License-Identifier: Apache-2.0
"""Pre-train a tiny encoder, fine-tune recognisers from it and from scratch, and stream a sentence.

    python pretrain_demo.py [--manifest train.json --validation-manifest validation.json] [--output outputs]

``make pretrain`` runs it. Without manifests it makes a synthetic corpus with transcripts. If an entry of a manifest has no
``text``, it stops after pre-training. Each choice of data and settings has its own folder under ``--output``, with a log
file for each stage. If you interrupt it, run the command again: it continues.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from script_tools import require_patches

HERE = Path(__file__).resolve().parent
CONFIG = 'nest_next_token_demo'
RECOGNISER_STEPS = 550
ARMS = {'pre-trained': '[preprocessor,encoder]', 'from scratch': '[]'}  # what the .nemo gives to each
STEP = re.compile(r'Epoch (\d+):.*?(\d+)/(\d+) \[')  # Lightning's progress bar, in the log of a stage

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
COLUMNS = (TextColumn('== {task.description}'), BarColumn(30), TextColumn('{task.fields[step]}'), TimeElapsedColumn())
progress = Progress(*COLUMNS, console=console, disable=not console.is_terminal)


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--manifest', type=Path, help='train manifest (default: make a synthetic corpus)')
    parser.add_argument('--validation-manifest', type=Path, help='validation manifest, required with --manifest')
    parser.add_argument('--output', default='outputs', type=Path, help='folder for all results')
    parser.add_argument('--config', default=CONFIG, help='name of a config in examples/asr/conf/ssl/nest')
    parser.add_argument(
        '--recogniser-steps', type=int, default=RECOGNISER_STEPS, help='steps of each fine-tuning; 0: pre-train only'
    )
    parser.add_argument('overrides', nargs='*', help='Hydra overrides of pre-training, such as trainer.max_steps=2000')
    options = parser.parse_args(argv)
    if bool(options.manifest) != bool(options.validation_manifest):
        parser.error('--manifest and --validation-manifest (MANIFEST and VAL_MANIFEST) go together')
    if options.recogniser_steps < 0:
        parser.error(f'--recogniser-steps is {options.recogniser_steps}; it must be 0 or more')
    return options


def run_stage(title: str, log: Path, script: str, *words, **environment: str) -> None:
    """Run a script of this folder as a stage: one line and a bar here, its output in a log file.

    Raises:
        SystemExit: with the script's status and the end of its log, if it fails.
    """
    command = [sys.executable, str(HERE / script), *map(str, words)]
    with open(log, 'wb') as output:
        bar = progress.add_task(f'{title:<44}', total=None, step='')
        if progress.disable:  # a log gets a line for each stage in place of the bars
            console.print(f'== {title}')
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        try:
            while process.poll() is None:
                time.sleep(0.5)
                progress.update(bar, **steps_done(log))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        progress.update(bar, total=1, completed=1)
    if process.returncode:
        tail = log.read_text(encoding='utf-8', errors='replace').splitlines()[-15:]
        console.print(*tail, f'pretrain_demo: error: {script} failed; its output is in {log}', sep='\n', markup=False)
        raise SystemExit(process.returncode)


def steps_done(log: Path) -> dict:
    """Return the progress that the end of a training log shows, as arguments of a progress bar."""
    with open(log, 'rb') as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        found = STEP.findall(file.read().decode(errors='replace'))
    if not found:
        return {}
    epoch, step, length = map(int, found[-1])
    return {'step': f'step {epoch * length + step}'}


def corpus(output: Path) -> dict[str, Path]:
    """Make the synthetic corpus, or use the one that is complete; returns its manifests by split."""
    folder = (output / 'speech_corpus').resolve()
    title = 'Making 40 minutes of synthetic speech'
    run_stage(title, output / 'corpus.log', 'make_speech_corpus.py', '--output', folder)
    return {split: folder / f'{split}_manifest.json' for split in ('train', 'validation', 'test', 'noise')}


def run_folder(options: argparse.Namespace, data: dict[str, Path]) -> Path:
    """Return the folder of this choice of data and settings."""
    settings = [options.config, *options.overrides, version('nemo_toolkit')]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in data.values():
        digest.update(path.read_bytes())
    folder = options.output / f"pretrain-{settings[-1]}-{digest.hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def train(title: str, folder: Path, script: str, config: str, overrides: list[str], **environment: str) -> Path:
    """Train with a training script, or continue an interrupted run; return the complete ``folder.nemo``."""
    model_file = folder.with_suffix('.nemo')
    if model_file.exists():
        console.print(f'== {title:<44} complete already: {model_file}')
        return model_file
    words = ['--config-name', config, f"+exp_manager.explicit_log_dir='{folder}'", *overrides]
    run_stage(title, folder.with_suffix('.log'), script, *words, **environment)
    (saved, *_) = sorted((folder / 'checkpoints').glob('*.nemo'), key=os.path.getmtime, reverse=True)
    os.replace(saved, model_file)
    return model_file


def pretrain(options: argparse.Namespace, data: dict[str, Path], folder: Path) -> Path:
    """Pre-train the encoder; returns the .nemo file."""
    statistics = folder / 'feature_stats.yaml'
    if not statistics.exists():
        words = ['--manifest', data['train'], '--output', statistics]
        run_stage('Computing feature statistics', folder / 'statistics.log', 'compute_feature_stats.py', *words)
    overrides = [
        f"model.train_ds.manifest_filepath='{data['train']}'",
        f"model.validation_ds.manifest_filepath='{data['validation']}'",
        f"model.train_ds.noise_manifest={repr(str(data['noise'])) if 'noise' in data else 'null'}",
        f"model.preprocessor.normalize='{statistics}'",
        'seed=0',
        'trainer.val_check_interval=100',
        'trainer.check_val_every_n_epoch=null',
        *options.overrides,
    ]
    return train('Pre-training without transcripts', folder / 'encoder', 'pretrain.py', options.config, overrides)


def fine_tune(arm: str, options: argparse.Namespace, data: dict[str, Path], folder: Path, encoder: Path) -> Path:
    """Fine-tune a recogniser of characters by CTC, from one of ``ARMS``; returns the .nemo file."""
    overrides = [
        f"init_from_nemo_model.pretrained.path='{encoder}'",
        f'init_from_nemo_model.pretrained.include={ARMS[arm]}',
        f"model.train_ds.manifest_filepath='{data['train']}'",
        f"model.validation_ds.manifest_filepath='{data['validation']}'",
        f'trainer.max_steps={options.recogniser_steps}',
    ]
    name = f"recogniser-{options.recogniser_steps}-{arm.replace(' ', '-')}"
    title = f'Fine-tuning a recogniser, {arm}'
    threads = str(max(1, (os.cpu_count() or 1) // len(ARMS)))
    script, config = 'finetune_streaming.py', 'streaming_ctc_tiny'
    return train(title, folder / name, script, config, overrides, OMP_NUM_THREADS=threads)


def fine_tune_all(*settings) -> dict[str, Path]:
    """Fine-tune all of ``ARMS`` at the same time; returns the .nemo files."""
    with ThreadPoolExecutor(len(ARMS)) as pool:
        return dict(zip(ARMS, pool.map(lambda arm: fine_tune(arm, *settings), ARMS)))


def entries_of(manifest: Path) -> list[dict]:
    """Return the entries of a manifest, with absolute paths of audio."""
    entries = [json.loads(line) for line in manifest.read_text(encoding='utf-8').splitlines() if line.strip()]
    return [{**entry, 'audio_filepath': str(manifest.parent / entry['audio_filepath'])} for entry in entries]


def error_rates(model, entries: list[dict]) -> dict[tuple[int, int], float]:
    """Return the character error rate of a CTC model on entries of a manifest, in each of its contexts."""
    from nemo.collections.asr.metrics.wer import word_error_rate

    paths, texts = [entry['audio_filepath'] for entry in entries], [entry['text'] for entry in entries]
    rates = {}
    for context in model.encoder.att_context_size_all:
        with model.encoder.using_att_context_size(context):
            hypotheses = [found.text for found in model.transcribe(paths, batch_size=8, verbose=False)]
        rates[tuple(context)] = word_error_rate(hypotheses=hypotheses, references=texts, use_cer=True)
    return rates


def stream(model, entry: dict) -> None:
    """Stream the audio of an entry as it would arrive, and print its words when they become final."""
    import soundfile
    import torch

    from nemo.collections.asr.parts.streaming.session import StreamingSession

    samples, rate = soundfile.read(entry['audio_filepath'], dtype='float32')
    session = StreamingSession(model.eval(), return_text=True)  # NeMo's transcribe leaves modules in training mode
    console.print('== Streaming a test sentence:', end=' ')

    def show(output) -> None:
        for update in output.text:
            console.print(*(word.text for word in update.final_words), end=' ' * bool(update.final_words))

    for piece in torch.from_numpy(samples).unsqueeze(0).split(rate * 80 // 1000, dim=1):
        show(session.step(piece))
    show(session.finish())
    console.print(f"\n   The transcript is:            {entry['text']}")


def compare(models: dict[str, Path], data: dict[str, Path], folder: Path) -> None:
    """Print and save the error rates of both recognisers, and stream a sentence with the pre-trained one."""
    from nemo.collections.asr.models import ASRModel
    from nemo.utils import logging
    from nemo.utils.atomic_files import write_json

    logging.setLevel(logging.ERROR)
    entries = entries_of(data.get('test', data['validation']))
    restored = {arm: ASRModel.restore_from(str(path), map_location='cpu').eval() for arm, path in models.items()}
    rates = {arm: error_rates(model, entries) for arm, model in restored.items()}
    table = Table('context', *ARMS, title=f'Character error rate on {len(entries)} held-out sentences')
    for context in rates['pre-trained']:
        table.add_row(str(list(context)), *(f'{rates[arm][context]:.1%}' for arm in ARMS))
    console.print(table)
    found = {arm: {str(list(context)): rate for context, rate in rows.items()} for arm, rows in rates.items()}
    write_json(folder / 'error_rates.json', found)
    stream(restored['pre-trained'], entries[min(1, len(entries) - 1)])


def main(argv=None) -> None:
    """Make data, pre-train, fine-tune twice, compare."""
    options = arguments(argv)
    require_patches(__file__)
    options.output.mkdir(parents=True, exist_ok=True)
    with progress:
        run(options)


def run(options: argparse.Namespace) -> None:
    """Run all stages."""
    if options.manifest:
        data = {'train': options.manifest.resolve(), 'validation': options.validation_manifest.resolve()}
    else:
        data = corpus(options.output)
    folder = run_folder(options, data)
    encoder = pretrain(options, data, folder)
    entries = [entry for split in ('train', 'validation') for entry in entries_of(data[split])]
    if options.recogniser_steps and all(entry.get('text') for entry in entries):
        models = fine_tune_all(options, data, folder, encoder)
        with open(folder / 'comparison.log', 'w') as log, redirect_stderr(log):  # what NeMo warns of
            compare(models, data, folder)
    else:
        console.print('== No recogniser: --recogniser-steps is 0, or a manifest has entries without text')
    console.print(f"""\
== Next, with your own data (docs/getting_started.md has each step):
   1. python {HERE / 'compute_feature_stats.py'} --manifest train.json --output stats.yaml
   2. python {HERE / 'pretrain.py'} --config-name=nest_next_token_streaming, with your manifests and stats.yaml
   3. python {HERE / 'finetune_streaming.py'}, then streaming_inference_example.py
   Models and logs of this run: {folder}; tensorboard --logdir {folder}""")


if __name__ == '__main__':
    main()
