# SPDX-License-Identifier: Apache-2.0
"""Figures of masks, windows and learning curves for TensorBoard and black-and-white print.

Each is a ``matplotlib.figure.Figure``, without pyplot and its global state.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms, look_ahead_text, seen_through_layers
from nemo.collections.asr.parts.att_context.visible_frames import masked_share_per_frame, no_visible_frame
from nemo.collections.asr.parts.att_context.windows import Window, tightest_window_of
from nemo.collections.asr.parts.objectives.base import BatchRecord
from nemo.utils.atomic_files import replacing

Curve = Sequence[tuple[float, float]]
# Lines of contexts differ without colour.
LINE_STYLES, GREYS, MARKERS = ('-', '--', ':', '-.'), ('0.0', '0.3', '0.5'), 'osD^vxP*'
HATCHED = dict(facecolor='white', edgecolor='black', linewidth=0)
BELOW = dict(loc='outside lower center', ncols=3, fontsize=8, frameon=False)
CURVE = re.compile('(val|train)_(loss|accuracy)/ctx_([^/]+)(?:/(.+))?')  # maybe of a part of the objective
CEILING = 'att_context_ceiling_left'
SMOOTHED = 40  # points of a curve of training


def attention_frame_ms(model) -> float:
    """Return the milliseconds of an attention frame."""
    settings = model.cfg.preprocessor
    stride = settings.get('window_stride', 0.01) or settings.n_window_stride / settings.get('sample_rate', 16000)
    return 1000 * stride * model.encoder.subsampling_factor


def look_ahead_title(model, context) -> str:
    """Return a context with the look-ahead of its output, for titles: ``[28, 13], look-ahead 1040 ms``."""
    milliseconds = look_ahead_ms(model.encoder, context, attention_frame_ms(model))
    return f'{list(context)}, look-ahead {look_ahead_text(milliseconds)}'


def masked_spectrogram(model, record: BatchRecord, title: str = '') -> Figure:
    """Draw the first utterance of a batch with its masked blocks, and below them its attention frames.

    The model is in the context of the pass that the record is of.
    """
    features = record.features[0, :, : int(record.feature_lengths[0])].detach().float().cpu().numpy()
    masks = record.masks[0, :1, : int(record.mask_lengths[0])].float().cpu()
    share = masked_share_per_frame(masks, record.factor)
    window = tightest_window_of(model.encoder) or Window(AttContext(UNLIMITED, UNLIMITED))
    lost, share = no_visible_frame(share, window, record.threshold)[0].numpy(), share[0].numpy()
    frame = attention_frame_ms(model) / 1000
    hop, unit = frame / model.encoder.subsampling_factor, frame / record.factor
    seconds = features.shape[1] * hop
    figure = Figure(figsize=(8.0, 4.6), layout='constrained')
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    low, high = np.percentile(features, (5, 99.5)) if features.size else (0, 1)
    looks = dict(origin='lower', aspect='auto', interpolation='nearest', cmap='gray_r', vmin=low, vmax=high)
    upper.imshow(features, extent=(0, seconds, 0, features.shape[0]), **looks)
    for start, end in _runs(masks[0].numpy() > 0):
        upper.axvspan(start * unit, end * unit, alpha=0.75, hatch='////', **HATCHED)
    upper.set(ylabel='feature', title=title)
    for label, where, style in (
        ('masked', share > record.threshold, dict(facecolor='0.15')),
        ('partly masked', (share > 0) & (share <= record.threshold), dict(facecolor='0.75')),
        (f'no visible frame ({lost.sum()})', lost, dict(HATCHED, hatch='xxxx')),
    ):
        spans = [(start * frame, (end - start) * frame) for start, end in _runs(where)]
        lower.broken_barh(spans, (0, 1), label=label, **style)
    lower.set(yticks=[], ylim=(0, 1), xlim=(0, max(seconds, frame)))
    lower.set_ylabel(f'frames of\n{1000 * frame:g} ms', rotation=0, ha='right', va='center', fontsize=8)
    lower.set_xlabel(f'seconds (a feature frame: {1000 * hop:g} ms)')
    figure.legend(*lower.get_legend_handles_labels(), **BELOW)
    return figure


def attention_windows(model, frames: int, frame: int | None = None) -> Figure:
    """Draw what a frame attends to in each layer in the present context, and what its output depends on.

    The utterance has so many attention frames; None takes the one at three quarters of it.

    Raises:
        ValueError: if the frame is not in the utterance, or the encoder's attention has no windows.
    """
    encoder = model.encoder
    frame = 3 * (frames - 1) // 4 if frame is None else frame
    if not 0 <= frame < frames:
        raise ValueError(f"frame is {frame}; the utterance has attention frames 0 to {frames - 1}")
    windows = [window.bounds(frame) for window in encoder.effective_windows()]
    figure = Figure(figsize=(8.0, 1.9 + 0.27 * len(windows)), layout='constrained')
    axis = figure.subplots()
    for bounds, height, grey, label in (
        (seen_through_layers(encoder, frame), 0.84, '0.85', f'what output {frame} depends on'),
        (windows, 0.42, '0.45', f'what frame {frame} attends to in this layer'),
    ):
        first, last = np.array(bounds).clip(0, frames - 1).T
        axis.barh(range(len(bounds)), last - first + 1, height, left=first, facecolor=grey, label=label)
    axis.axvline(frame + 0.5, color='black', linewidth=1, linestyle='--', label=f'frame {frame}')
    own = ['' if context is None else f'  {context.as_list()}' for context in encoder.layer_att_contexts()]
    axis.set_yticks(range(len(windows)), [f'{layer}{context}' for layer, context in enumerate(own)], fontsize=8)
    axis.set(ylabel='layer and its own context' if any(own) else 'layer', ylim=(-0.6, len(windows) - 0.4))
    axis.set(xlabel=f'attention frame ({attention_frame_ms(model):g} ms each)', xlim=(0, frames))
    figure.suptitle(f'attention in context {look_ahead_title(model, encoder.att_context_size)}', fontsize=10)
    figure.legend(**BELOW)
    return figure


def learning_curves(curves: Mapping[str, Curve]) -> Figure:
    """Draw loss and accuracy for each context over training steps, and the curriculum's ceiling, if any.

    Each part of an objective has a panel. ``curves`` are (step, value) pairs by metric name, ``val_loss/ctx_40_0`` and
    ``val_loss/ctx_40_0/next_0``, ``val_accuracy/...``, ``train_loss/...``, ``att_context_ceiling_left``; others are
    ignored. ValueError if there is none of any context.
    """
    found = [match.groups('') for match in map(CURVE.fullmatch, curves) if match]
    if not found:
        raise ValueError("there is no val_loss/ctx_... or train_loss/ctx_... in these logs")
    contexts = sorted({context for _, _, context, _ in found}, key=_breadth)
    panels = sorted({(part, metric) for _, metric, _, part in found}, key=lambda each: (each[0], each[1] != 'loss'))
    count = len(panels) + (CEILING in curves)
    figure = Figure(figsize=(8.0, 1.0 + 2.5 * count), layout='constrained')
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axis, (part, metric) in zip(axes, panels):
        for context, style, grey, marker in zip(contexts, *map(itertools.cycle, (LINE_STYLES, GREYS, MARKERS))):
            name, line = f'{metric}/ctx_{context}/{part}'.rstrip('/'), dict(linestyle=style, color=grey)
            if curve := curves.get(f'train_{name}'):
                thin = dict(line, linewidth=0.7, alpha=0.7, label=f'{_named(context)} in training, smoothed')
                axis.plot(*_smooth(curve), **thin)
            if curve := curves.get(f'val_{name}'):
                line.update(linewidth=1.4, marker=marker, markerfacecolor='none')
                axis.plot(*zip(*sorted(curve)), **line, label=f'{_named(context)} in validation')
        axis.set_ylabel(f'{part} {metric}{" (nats)" if metric == "loss" else ""}'.strip(), fontsize=9)
    if CEILING in curves:
        steps, lefts = np.array(sorted(curves[CEILING])).T
        axes[-1].plot(steps, np.where(lefts < 0, math.nan, lefts), color='black', drawstyle='steps-post')
        axes[-1].set_ylabel('ceiling on the left\ncontext (frames)', fontsize=9)
    axes[-1].set_xlabel('optimizer steps')
    figure.legend(*axes[0].get_legend_handles_labels(), handlelength=4, **BELOW)
    return figure


def _breadth(label: str) -> tuple:
    """Sort contexts from narrow to wide, then a sampler's groups of chunks (``chunk_8_to_15``)."""
    sides = re.findall('unlimited|[0-9]+', label)
    return label.startswith('chunk'), [math.inf if side == 'unlimited' else int(side) for side in sides]


def _named(label: str) -> str:
    kind, _, sizes = label.partition('chunk_')
    return f"chunks of {sizes.replace('_', ' ')}" if sizes else f"[{kind.replace('_', ', ')}]"


def _smooth(curve: Curve) -> np.ndarray:
    """Return steps and values [2, N] of a curve, a long one as the medians of equal parts."""
    parts = np.array_split(sorted(curve), min(len(curve), SMOOTHED))
    return np.array([np.median(part, axis=0) for part in parts]).T


def read_curves(path) -> dict[str, Curve]:
    """Return the curves of a training run by metric; of equal steps those of the later run.

    The path is an event file of TensorBoard, or a folder with some in it, at any depth; ValueError if there is none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob('*.tfevents.*'), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ValueError(f"{path}: there are no event files of TensorBoard (*.tfevents.*)")
    curves: dict[str, dict[float, float]] = defaultdict(dict)
    for file in files:
        events = EventAccumulator(str(file), size_guidance={'scalars': 0, 'images': 1}).Reload()  # 0: all of them
        for name in events.Tags()['scalars']:
            curves[name].update((event.step, event.value) for event in events.Scalars(name))
    return {name: sorted(values.items()) for name, values in curves.items()}


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Return first and one past the last index of each run of true values."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def save_figure(figure: Figure, stem) -> list[Path]:
    """Write a picture as PNG and SVG, atomically, to a path without its ending; return the files."""
    files = []
    for ending, metadata in (('png', None), ('svg', {'Date': None})):  # the same picture gives the same file
        file = Path(f'{stem}.{ending}')
        with replacing(file) as partial, matplotlib.rc_context({'svg.hashsalt': file.name, 'svg.fonttype': 'path'}):
            figure.savefig(partial, format=ending, dpi=120, metadata=metadata)
        files.append(file)
    return files
