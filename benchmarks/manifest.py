# SPDX-License-Identifier: Apache-2.0
"""Measure seconds and memory that a long manifest costs before the first step, by part of the start.

    python benchmarks/manifest.py [--lines 1000000] [--workers 2] [--json manifest.json]

Writes a manifest of that many lines, all of one short file, and measures, each in a process of its own: the check of
the config (`check_manifest`), the dataset, the dataset with the first batch that workers give, in a plain and in a
resumable data loader, and the whole start: the check, the dataset and the first batch, one after the other as in training.
The last is measured again for another rank of the machine, or the next start, which find what the first has left;
the others find nothing.
The same with stock NeMo, but for the check and the resumable loader, which it lacks. Memory is of the process and its
workers, and what they share counts once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import Quick

LINE = {
    'audio_filepath': 'a.wav',
    'duration': 1.5,
    'text': 'an utterance of some ten words as manifests often have them',
}
MEGABYTE = 1e6
STOCK = ('dataset, stock NeMo', 'first batch, stock NeMo')
PARTS = (
    *STOCK,
    'check',
    'dataset',
    'first batch',
    'first batch, resumable',
    'whole start, resumable',
    'whole start, again',
)


def write_manifest(folder: Path, lines: int) -> Path:
    """Write a short file of noise, and a manifest that names it on every line."""
    import numpy
    import soundfile

    soundfile.write(folder / 'a.wav', numpy.random.default_rng(0).normal(0, 0.1, 24000), 16000)
    path = folder / 'manifest.json'
    with open(path, 'w', encoding='utf-8') as file:
        for number in range(lines):
            file.write(json.dumps({**LINE, 'duration': 1.5 + number % 100 / 100}) + '\n')
    return path


def resident_megabytes() -> float:
    """The memory that this process and its children hold at present; pages that they share count once."""
    processes = [os.getpid(), *_children(os.getpid())]
    return sum(_proportional_kilobytes(process) for process in processes) * 1024 / MEGABYTE


def _proportional_kilobytes(process: int) -> int:
    rows = Path(f'/proc/{process}/smaps_rollup').read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith('Pss:'))


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f'/proc/{process}/task/{process}/children').read_text().split()]


def measure(part: str, manifest: str, workers: int) -> dict:
    """Run a part in this process, which imports NeMo first; return seconds and the megabytes it added."""
    from omegaconf import OmegaConf
    from torch.utils.data import DataLoader

    from nemo.collections.asr.data import ssl_dataset

    if part not in STOCK:
        from nemo.collections.asr.data.data_checks import check_manifest
        from nemo.collections.asr.data.resumable_loader import make_resumable

    before, start = resident_megabytes(), time.perf_counter()
    if part.startswith(('check', 'whole')):
        kept = check_manifest(manifest, 'manifest', 0.1, 16.0)
    if not part.startswith('check'):
        config = {'manifest_filepath': manifest, 'sample_rate': 16000, 'shuffle': True, 'max_duration': 16.0}
        kept = dataset = ssl_dataset.get_audio_noise_dataset_from_config(OmegaConf.create(config), 0, 1)
    if part.startswith(('first batch', 'whole')):
        loader = DataLoader(dataset, 8, shuffle=True, num_workers=workers, collate_fn=dataset.collate_fn)
        kept = iter(make_resumable(loader, {'seed': 0}) if part.endswith(('resumable', 'again')) else loader)
        next(kept)
    seconds = time.perf_counter() - start
    return {'part': part, 'seconds': round(seconds, 2), 'megabytes': round(resident_megabytes() - before, 1)}


def main(argv=None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description='What a long manifest costs before the first step.')
    parser.add_argument('--lines', type=int, default=1_000_000)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--json', help='also write the figures to this file')
    parser.add_argument('--quick', action=Quick, small=dict(lines=100, workers=0))
    parser.add_argument('--part', choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument('--manifest', help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        print(json.dumps(measure(options.part, options.manifest, options.workers)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_manifest(Path(folder), options.lines)
        print(f'{options.lines} lines, {manifest.stat().st_size / MEGABYTE:.0f} MB, {options.workers} workers')
        print('| part of the start | seconds | MB added |\n| --- | ---: | ---: |')
        for part in PARTS:
            command = [sys.executable, __file__, '--part', part, '--manifest', str(manifest)]
            command += ['--workers', str(options.workers)]
            if not part.endswith('again'):
                temporary = tempfile.mkdtemp(dir=folder)
            overlay = {**os.environ, 'NEMO_STREAMING_SSL': '0' if part in STOCK else '1', 'TMPDIR': temporary}
            done = subprocess.run(
                command, env=overlay, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"| {part} | {results[-1]['seconds']:.1f} | {results[-1]['megabytes']:.0f} |", flush=True)
    if options.json:
        from nemo.utils.atomic_files import write_text

        write_text(options.json, json.dumps({'lines': options.lines, 'results': results}, indent=1) + '\n')


if __name__ == '__main__':
    main()
