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
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms, look_ahead_text, seen_through_layers
from nemo.collections.asr.parts.att_context.visible_frames import masked_share_per_frame, no_visible_frame
from nemo.collections.asr.parts.att_context.windows import STYLES, Window, tightest_window_of
from nemo.collections.asr.parts.objectives.base import BatchRecord
from nemo.utils.atomic_files import replacing

Curve = Sequence[tuple[float, float]]
# Lines of contexts differ without colour.
LINE_STYLES, GREYS, MARKERS = ('-', '--', ':', '-.'), ('0.0', '0.3', '0.5'), 'osD^vxP*'
HATCHED = dict(facecolor='white', edgecolor='black', linewidth=0)
BELOW = dict(loc='outside lower center', ncols=3, fontsize=8, frameon=False)
CURVE = re.compile('(?:val|train)_loss/ctx_([^/]+)(?:/(.+))?')  # of a context, and maybe of a part of the objective
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


def masked_spectrogram(model, record: BatchRecord, title: str = '', index: int = 0) -> Figure:
    """Draw an utterance of a batch with its masked blocks, and below them its attention frames.

    The model is in the context of the pass that the record is of.
    """
    features = record.features[index, :, : int(record.feature_lengths[index])].detach().float().cpu().numpy()
    masks = record.masks[index, :1, : int(record.mask_lengths[index])].float().cpu()
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
    upper.set_ylabel('feature')
    upper.set_title(title, fontsize=10)
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


def attention_windows(
    encoder, frame: int | None, frames: int, frame_ms: float, att_context_size=None, title: str = ''
) -> Figure:
    """Draw what one attention frame attends to in each layer, and what its output depends on.

    The utterance has so many frames; None takes the frame at three quarters of it, and the encoder's present context.

    Raises:
        ValueError: if the frame is not in the utterance, or the encoder's attention has no windows.
    """
    frame = 3 * (frames - 1) // 4 if frame is None else frame
    if not 0 <= frame < frames:
        raise ValueError(f"frame is {frame}; the utterance has attention frames 0 to {frames - 1}")
    fields = seen_through_layers(encoder, frame, att_context_size)
    windows = [window.bounds(frame) for window in encoder.effective_windows(att_context_size)]
    figure = Figure(figsize=(8.0, 1.9 + 0.27 * len(windows)), layout='constrained')
    axis = figure.subplots()
    for bounds, height, grey, label in (
        (fields, 0.84, '0.85', f'what output {frame} depends on'),
        (windows, 0.42, '0.45', f'what frame {frame} attends to in this layer'),
    ):
        first, last = np.array(bounds).clip(0, frames - 1).T
        axis.barh(range(len(bounds)), last - first + 1, height, left=first, facecolor=grey, label=label)
    axis.axvline(frame + 0.5, color='black', linewidth=1, linestyle='--', label=f'frame {frame}')
    own = ['' if context is None else f'  {context.as_list()}' for context in encoder.layer_att_contexts()]
    axis.set_yticks(range(len(windows)), [f'{layer}{context}' for layer, context in enumerate(own)], fontsize=8)
    axis.set(ylabel='layer and its own context' if any(own) else 'layer', ylim=(-0.6, len(windows) - 0.4))
    axis.set(xlabel=f'attention frame ({frame_ms:g} ms each)', xlim=(0, frames))
    figure.suptitle(title, fontsize=10)
    figure.legend(**BELOW)
    return figure


def learning_curves(curves: Mapping[str, Curve]) -> Figure:
    """Draw loss and accuracy for each context over training steps, and the curriculum's ceiling, if any.

    Each part of an objective has a panel. ``curves`` are (step, value) pairs by metric name, ``val_loss/ctx_40_0`` and
    ``val_loss/ctx_40_0/next_0``, ``val_accuracy/...``, ``train_loss/...``, ``att_context_ceiling_left``; others are
    ignored.

    Raises:
        ValueError: if there is no loss of any context.
    """
    found = [match for match in map(CURVE.fullmatch, curves) if match]
    if not found:
        raise ValueError("there is no val_loss/ctx_... or train_loss/ctx_... in these logs")
    contexts, parts = sorted({match[1] for match in found}, key=_breadth), sorted({match[2] or '' for match in found})
    panels: dict[str, list[tuple[Curve, dict]]] = defaultdict(list)  # of curves and their looks
    lines = zip(*map(itertools.cycle, (LINE_STYLES, GREYS, MARKERS)))
    for index, (context, (style, grey, marker)) in enumerate(zip(contexts, lines)):
        line = dict(linestyle=style, color=grey)
        thin = dict(line, linewidth=0.7, alpha=0.7, label=f'{_named(context)} in training, smoothed')
        panels['loss (nats)'].append((_smooth(curves.get(f'train_loss/ctx_{context}', ())), thin))
        line.update(linewidth=1.4, label=f'{_named(context)} in validation', markerfacecolor='none')
        line.update(marker=marker, markersize=max(8 - 1.5 * index, 3))  # one inside the other
        for part, (metric, label) in itertools.product(parts, (('loss', 'loss (nats)'), ('accuracy', 'accuracy'))):
            curve = curves.get(f'val_{metric}/ctx_{context}/{part}'.rstrip('/'), ())
            panels[f'{part} {label}'.strip()].append((curve, line))
    ceiling = [(step, math.nan if left < 0 else left) for step, left in curves.get(CEILING, ())]
    panels['ceiling on the left\ncontext (frames)'] = [(ceiling, dict(color='black', drawstyle='steps-post'))]
    panels = {label: drawn for label, drawn in panels.items() if any(curve for curve, _ in drawn)}
    figure = Figure(figsize=(8.0, 1.0 + 2.5 * len(panels)), layout='constrained')
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, drawn) in zip(axes, panels.items()):
        for curve, looks in drawn:
            if curve:
                axis.plot(*zip(*sorted(curve)), **looks)
        axis.set_ylabel(label, fontsize=9)
        axis.grid(alpha=0.35, linewidth=0.5)
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


def _smooth(curve: Curve) -> Curve:
    """Return the medians of a curve in equal parts; a short curve as it is."""
    parts = np.array_split(np.array(sorted(curve)), SMOOTHED) if len(curve) > SMOOTHED else []
    return [tuple(np.median(part, axis=0)) for part in parts] or curve


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


def draw_contexts(model, record: BatchRecord) -> None:
    """Put pictures of the first utterance of a pass, within its context, into TensorBoard.

    They are ``contexts/masked_spectrogram``, where the objective masks, and ``contexts/attention_windows``.
    """
    encoder, step, drawn = model.encoder, model.trainer.global_step, {}
    loggers = [logger for logger in model.trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not loggers or not model.trainer.is_global_zero:
        return
    if model.objectives.masks:
        drawn['masked_spectrogram'] = masked_spectrogram(model, record, f'first validation utterance, step {step}')
    if getattr(encoder, 'att_context_style', None) in STYLES:
        frames = max(int(record.feature_lengths[0]) // encoder.subsampling_factor, 1)
        title = f'attention in context {look_ahead_title(model, encoder.att_context_size)}'
        drawn['attention_windows'] = attention_windows(encoder, None, frames, attention_frame_ms(model), title=title)
    for logger, (name, figure) in itertools.product(loggers, drawn.items()):
        logger.experiment.add_figure(f'contexts/{name}', figure, global_step=step, close=False)
