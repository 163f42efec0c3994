# SPDX-License-Identifier: Apache-2.0
"""The curves of a training run, from what its loggers wrote: TensorBoard's event files or Lightning's metrics.csv."""

import csv
from pathlib import Path

EVENT_FILES = 'events.out.tfevents.*'
CSV_FILE = 'metrics.csv'

Curves = dict[str, list[tuple[float, float]]]


def read_curves(path) -> Curves:
    """Return (step, value) pairs by metric name, by step; a later run over the same steps replaces an earlier one's.

    Args:
        path: an event file or a metrics.csv, or a folder with some of them somewhere in it.

    Raises:
        ValueError: naming the path, if there is nothing to read, or tensorboard is missing.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    folder = path.is_dir()
    event_files = sorted(path.rglob(EVENT_FILES)) if folder else [path] if '.tfevents.' in path.name else []
    tables = sorted(path.rglob(CSV_FILE)) if folder else [path] if path.suffix == '.csv' else []
    if not event_files and not tables:
        raise ValueError(f"{path}: there are no logs in it, neither {EVENT_FILES} nor {CSV_FILE}")
    points: dict[str, dict[float, float]] = {}
    for file in sorted(event_files, key=lambda file: file.stat().st_mtime):
        _read_events(file, points)
    for file in [] if event_files else tables:
        _read_table(file, points)
    return {name: sorted(values.items()) for name, values in points.items()}


def _read_events(file: Path, points) -> None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ValueError(
            f"{file} is read with tensorboard, which is not installed: pip install tensorboard"
        ) from error
    everything, nothing = 0, 1  # of TensorBoard's size guidance
    guidance = {'scalars': everything, 'images': nothing, 'tensors': nothing, 'histograms': nothing}
    events = EventAccumulator(str(file), size_guidance=guidance)
    events.Reload()
    for name in events.Tags()['scalars']:
        points.setdefault(name, {}).update((event.step, event.value) for event in events.Scalars(name))


def _read_table(file: Path, points) -> None:
    with open(file, newline='', encoding='utf-8') as lines:
        for row in csv.DictReader(lines):
            for name, value in row.items():
                if value and name not in ('step', 'epoch', None):
                    points.setdefault(name, {})[float(row['step'])] = float(value)
