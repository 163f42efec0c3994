# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Pictures of masking, attention windows and learning curves, legible in black-and-white print.

Each function returns a ``matplotlib.figure.Figure``, without pyplot and its global state. Matplotlib is imported when
a picture is made; :func:`require_matplotlib` finds out beforehand whether it can be.

Shapes: D features, T feature frames, M mask frames, A attention frames.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Mapping, Optional, Sequence

import numpy as np

from nemo.collections.asr.parts.att_context.answerability import MASK_THRESHOLD
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.utils.atomic_files import replacing

# One for each context, the same in every picture: told apart without colour.
LINE_STYLES = ('-', '--', ':', '-.', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1, 1, 1)))
MARKERS = 'osD^vxP*'
GREYS = ('0.0', '0.3', '0.0', '0.45', '0.2', '0.0', '0.5', '0.3')
DOTS_PER_INCH = 120
FORMATS = ('png', 'svg')


def require_matplotlib(wanted_by: str) -> None:
    """Raise an error that says what to do if matplotlib is not installed.

    Args:
        wanted_by: what to name in the error: a config key or a script.

    Raises:
        ValueError: if it is not.
    """
    if find_spec('matplotlib') is None:
        raise ValueError(f"{wanted_by} draws with matplotlib, which is not installed: pip install matplotlib")


def masked_spectrogram(
    features: np.ndarray,
    masks: np.ndarray,
    hop_seconds: float,
    factor: int,
    unanswerable: Optional[np.ndarray] = None,
    title: str = '',
):
    """Draw a spectrogram with its masked blocks, and below what that means for the attention frames.

    Args:
        features: [D, T].
        masks: [M], 1 or True where masked; M is T, or where masking follows the subsampling T // factor or so.
        hop_seconds: length of a feature frame.
        factor: feature frames per attention frame.
        unanswerable: [A] bool, which masked attention frames nobody can answer; None leaves them out.
        title: of the picture.
    """
    figure = _figure(height=4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    seconds = features.shape[1] * hop_seconds
    low, high = np.percentile(features, (5, 99.5)) if features.size else (0, 1)
    upper.imshow(
        features,
        origin='lower',
        aspect='auto',
        interpolation='nearest',
        cmap='gray_r',
        extent=(0, seconds, 0, features.shape[0]),
        vmin=low,
        vmax=high,
    )
    post_conv = masks.shape[0] < features.shape[1]
    unit = hop_seconds * (factor if post_conv else 1)
    for index, (start, end) in enumerate(_runs(masks > 0)):
        block = dict(facecolor='white', alpha=0.75, hatch='////', edgecolor='black', linewidth=0)
        upper.axvspan(start * unit, end * unit, label=None if index else 'masked', **block)
    upper.set_ylabel('feature')
    upper.set_title(title, fontsize=10)
    _draw_attention_frames(lower, masks, 1 if post_conv else factor, hop_seconds * factor, unanswerable)
    lower.set_xlabel(f'seconds (a feature frame: {1000 * hop_seconds:g} ms)')
    lower.set_xlim(0, max(seconds, unit))
    if upper.get_legend_handles_labels()[1]:
        upper.legend(loc='upper right', fontsize=8, framealpha=1)
    return figure


def _draw_attention_frames(axis, masks, factor: int, frame_seconds: float, unanswerable) -> None:
    frames = masks.shape[0] // factor
    share = masks[: frames * factor].reshape(frames, factor).mean(axis=1) if frames else np.zeros(0)
    states = [('masked', share > MASK_THRESHOLD, dict(facecolor='0.15'))]
    states.append(('partly masked', (share > 0) & (share <= MASK_THRESHOLD), dict(facecolor='0.75')))
    if unanswerable is not None:
        crosses = dict(facecolor='white', hatch='xxxx', edgecolor='black', linewidth=0)
        states.append((f'unanswerable ({int(unanswerable.sum())})', unanswerable[:frames], crosses))
    for label, where, style in states:
        spans = [(start * frame_seconds, (end - start) * frame_seconds) for start, end in _runs(where)]
        axis.broken_barh(spans, (0, 1), label=label, **style)
    axis.set_yticks([])
    axis.set_ylim(0, 1)
    axis.set_ylabel(f'frames of\n{1000 * frame_seconds:g} ms', rotation=0, ha='right', va='center', fontsize=8)
    axis.legend(loc='upper center', bbox_to_anchor=(0.5, -0.75), ncols=len(states), fontsize=8, frameon=False)


def attention_windows(
    windows: Sequence[tuple[float, float]],
    seen: Sequence[tuple[float, float]],
    frame: int,
    frames: int,
    frame_seconds: float,
    own: Optional[Sequence[Optional[AttContext]]] = None,
    title: str = '',
):
    """Draw what one attention frame attends to in each layer, and what its output depends on through all of them.

    Args:
        windows: for each layer, the lowest first, the first and the last frame that the frame attends to.
        seen: for each layer, the first and the last of its input frames that the stack's output of the frame depends
            on; see ``seen_through_layers``.
        frame: the frame.
        frames: A, of the utterance, which cuts both.
        frame_seconds: length of an attention frame.
        own: contexts of the layers' own, for the labels.
        title: of the picture.
    """
    figure = _figure(height=1.9 + 0.27 * len(windows))
    axis = figure.subplots()
    for layer, (window, field) in enumerate(zip(windows, seen)):
        for (first, last), style, label in (
            (field, dict(facecolor='0.85', height=0.84), f'what output {frame} depends on'),
            (window, dict(facecolor='0.45', height=0.42), f'what frame {frame} attends to in this layer'),
        ):
            first, last = max(first, 0), min(last, frames - 1)
            axis.barh(layer, last - first + 1, left=first, label=None if layer else label, **style)
    axis.axvline(frame + 0.5, color='black', linewidth=1, linestyle='--', label=f'frame {frame}')
    labels = [str(layer) for layer in range(len(windows))]
    if own is not None and any(context is not None for context in own):
        labels = [f'{layer}  {"-" if context is None else context.as_list()}' for layer, context in enumerate(own)]
    axis.set_yticks(range(len(windows)), labels, fontsize=8)
    axis.set_ylabel('layer' if labels[0] == '0' else 'layer and its own context')
    axis.set_ylim(-0.6, len(windows) - 0.4)
    axis.set_xlim(0, frames)
    axis.set_xlabel(f'attention frame ({1000 * frame_seconds:g} ms each)')
    above = axis.secondary_xaxis('top', functions=(lambda x: x * frame_seconds, lambda x: x / frame_seconds))
    above.set_xlabel('seconds')
    figure.suptitle(title, fontsize=10)
    figure.legend(loc='outside lower center', ncols=3, fontsize=8, frameon=False)
    return figure


def learning_curves(curves: Mapping[str, Sequence[tuple[float, float]]], title: str = ''):
    """Draw loss and accuracy for each context over training steps, and the ceiling of the curriculum if there was one.

    Args:
        curves: (step, value) pairs by metric name: ``val_loss/ctx_40_0``, ``val_accuracy/ctx_40_0``,
            ``train_loss/ctx_40_0``, ``att_context_ceiling_left``; others are passed over.
        title: of the picture.

    Raises:
        ValueError: if there is no loss of any context.
    """
    contexts = contexts_in(curves)
    if not contexts:
        raise ValueError("there is no val_loss/ctx_... or train_loss/ctx_... in these logs")
    ceiling = curves.get('att_context_ceiling_left', ())
    panels = ['loss (nats per masked frame)']
    if any(name.startswith('val_accuracy/ctx_') for name in curves):
        panels.append('masked-token accuracy (%)')
    if ceiling:
        panels.append('ceiling on the left\ncontext (frames)')
    ratios = [1 if 'ceiling' in name else 2.2 for name in panels]
    figure = _figure(height=1.0 + 1.25 * sum(ratios))
    axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True, height_ratios=ratios))
    for axis, label in zip(axes, panels):
        axis.set_ylabel(label, fontsize=9)
        axis.grid(alpha=0.35, linewidth=0.5)
    for index, context in enumerate(contexts):
        _draw_context(axes, curves, context, index)
    if ceiling:
        steps, lefts = zip(*sorted(ceiling))
        axes[-1].step(steps, [math.nan if left < 0 else left for left in lefts], where='post', color='black')
        axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlabel('optimizer steps')
    figure.suptitle(title, fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3, fontsize=8, frameon=False, handlelength=4)
    return figure


def contexts_in(curves: Mapping) -> list[str]:
    """Return the contexts' labels that curves are named after, the narrowest first."""
    names = [name.partition('/ctx_')[2] for name in curves if name.startswith(('val_loss/ctx_', 'train_loss/ctx_'))]
    return sorted(set(names), key=_breadth)


def _breadth(label: str) -> tuple:
    """Sort contexts from narrow to wide, and after them the groups of chunks that a sampler draws (``chunk_8_to_15``)."""
    kind, _, sizes = label.partition('chunk_')
    sides = [side for side in (sizes or kind).split('_') if side != 'to']
    return bool(sizes), [math.inf if side == 'unlimited' else int(side) for side in sides]


def _named(label: str) -> str:
    kind, _, sizes = label.partition('chunk_')
    return f"chunks of {sizes.replace('_', ' ')}" if sizes else f"[{kind.replace('_', ', ')}]"


def _draw_context(axes, curves, context: str, index: int) -> None:
    named = _named(context)
    style = dict(linestyle=LINE_STYLES[index % len(LINE_STYLES)], color=GREYS[index % len(GREYS)], linewidth=1.4)
    size = max(8 - 1.5 * index, 3)  # lines that lie on each other show their marks one inside the other
    marks = dict(marker=MARKERS[index % len(MARKERS)], markersize=size, markerfacecolor='none')
    trained = _smooth(curves.get(f'train_loss/ctx_{context}', ()))
    validated = curves.get(f'val_loss/ctx_{context}', ())
    if trained:
        label = f'{named} in training, smoothed'
        axes[0].plot(*zip(*trained), **{**style, 'linewidth': 0.7}, alpha=0.7, label=label)
    if validated:
        axes[0].plot(*zip(*sorted(validated)), **style, **marks, label=f'{named} in validation')
    accuracy = curves.get(f'val_accuracy/ctx_{context}', ())
    if accuracy:
        steps, shares = zip(*sorted(accuracy))
        axes[1].plot(steps, [100 * share for share in shares], **style, **marks)


def _smooth(curve, points: int = 40) -> list[tuple[float, float]]:
    """Return the medians of a curve in so many equal parts; a short curve as it is."""
    curve = sorted(curve)
    if len(curve) <= points:
        return curve
    return [tuple(np.median(np.array(part), axis=0)) for part in np.array_split(np.array(curve), points)]


def save_figure(figure, stem) -> list[Path]:
    """Write a picture as PNG and SVG, each whole or not at all.

    Args:
        figure: the picture.
        stem: path of the files without their ending; the folder must exist.

    Returns:
        the files.
    """
    import matplotlib

    files = [Path(f'{stem}.{ending}') for ending in FORMATS]
    for file, ending in zip(files, FORMATS):
        undated = {'Date': None} if ending == 'svg' else None  # the same picture gives the same file
        with replacing(file) as partial, matplotlib.rc_context({'svg.hashsalt': file.name, 'svg.fonttype': 'path'}):
            figure.savefig(partial, format=ending, dpi=DOTS_PER_INCH, metadata=undated)
    return files


def _figure(height: float, width: float = 8.0):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Return first and one past the last index of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(flags, dtype=np.int8), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))
