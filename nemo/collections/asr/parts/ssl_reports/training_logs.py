# SPDX-License-Identifier: Apache-2.0
"""Curves of a training run, from TensorBoard's event files or Lightning's metrics.csv."""

import csv
from collections import defaultdict
from pathlib import Path

EVENT_FILES, CSV_FILE = '*.tfevents.*', 'metrics.csv'


def read_curves(path) -> dict[str, list[tuple[float, float]]]:
    """Return (step, value) pairs by metric, in order; of equal steps those of the later run.

    The path is an event file or a metrics.csv, or a folder with some of them somewhere in it.

    Raises:
        ValueError: naming the path, if there is nothing to read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    files = [path] if path.is_file() else list(path.rglob('*'))
    events, tables = ([file for file in files if file.match(pattern)] for pattern in (EVENT_FILES, CSV_FILE))
    if not events and not tables:
        raise ValueError(f"{path}: there are no logs in it, neither {EVENT_FILES} nor {CSV_FILE}")
    points: dict[str, dict[float, float]] = defaultdict(dict)
    for file in sorted(events or tables, key=lambda file: file.stat().st_mtime):
        for name, step, value in _events(file) if events else _rows(file):
            points[name][step] = value
    return {name: sorted(values.items()) for name, values in points.items()}


def _events(file: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(file), size_guidance={'scalars': 0, 'images': 1})  # 0: all of them
    events.Reload()
    for name in events.Tags()['scalars']:
        yield from ((name, event.step, event.value) for event in events.Scalars(name))


def _rows(file: Path):
    with open(file, newline='', encoding='utf-8') as lines:
        for row in csv.DictReader(lines):
            for name, value in row.items():
                if value and name not in ('step', 'epoch', None):
                    yield name, float(row['step']), float(value)
