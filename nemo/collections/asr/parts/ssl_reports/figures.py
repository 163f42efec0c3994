# SPDX-License-Identifier: Apache-2.0
"""Figures of masking, surprise, attention windows and learning curves, legible in black-and-white print.

Each function returns a ``matplotlib.figure.Figure``, without pyplot and its global state. Matplotlib is imported when
a picture is made; :func:`require_matplotlib` finds out beforehand whether it can be.

Shapes: D features, T feature frames, M mask frames, A attention frames, S target frames.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.visible_frames import MASK_THRESHOLD
from nemo.utils.atomic_files import replacing

# One for each context, the same in every picture: told apart without colour.
LINE_STYLES = ('-', '--', ':', '-.', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1, 1, 1)))
MARKERS = 'osD^vxP*'
GREYS = ('0.0', '0.3', '0.0', '0.45', '0.2', '0.0', '0.5', '0.3')
DOTS_PER_INCH = 120
FORMATS = ('png', 'svg')
PART = re.compile('masked|next_[0-9]+')  # of an objective, as the last part of a curve's name


def require_matplotlib(wanted_by: str) -> None:
    """Raise an error if matplotlib is not installed.

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
    no_visible_frame: np.ndarray | None = None,
    title: str = '',
):
    """Draw a spectrogram with its masked blocks, and below what that means for the attention frames.

    Args:
        features: [D, T].
        masks: [M], 1 or True where masked; M is T, or where masking follows the subsampling T // factor or so.
        hop_seconds: length of a feature frame.
        factor: feature frames per attention frame.
        no_visible_frame: [A] bool, the masked attention frames without a visible one in their window; None leaves them out.
        title: of the picture.
    """
    figure = _figure(height=4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    seconds = features.shape[1] * hop_seconds
    post_conv = masks.shape[0] < features.shape[1]
    unit = hop_seconds * (factor if post_conv else 1)
    _draw_spectrogram(upper, features, seconds, title)
    _draw_blocks(upper, masks, unit)
    _draw_attention_frames(lower, masks, 1 if post_conv else factor, hop_seconds * factor, no_visible_frame)
    lower.set_xlabel(f'seconds (a feature frame: {1000 * hop_seconds:g} ms)')
    lower.set_xlim(0, max(seconds, unit))
    return figure


def _draw_spectrogram(axis, features: np.ndarray, seconds: float, title: str) -> None:
    low, high = np.percentile(features, (5, 99.5)) if features.size else (0, 1)
    axis.imshow(
        features,
        origin='lower',
        aspect='auto',
        interpolation='nearest',
        cmap='gray_r',
        extent=(0, seconds, 0, features.shape[0]),
        vmin=low,
        vmax=high,
    )
    axis.set_ylabel('feature')
    axis.set_title(title, fontsize=10)


def _draw_blocks(axis, masks: np.ndarray, unit: float) -> None:
    """Hatch what is masked [M], of frames of so many seconds."""
    for index, (start, end) in enumerate(_runs(masks > 0)):
        block = dict(facecolor='white', alpha=0.75, hatch='////', edgecolor='black', linewidth=0)
        axis.axvspan(start * unit, end * unit, label=None if index else 'masked', **block)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc='upper right', fontsize=8, framealpha=1)


def _draw_attention_frames(axis, masks, factor: int, frame_seconds: float, no_visible_frame) -> None:
    frames = masks.shape[0] // factor
    share = masks[: frames * factor].reshape(frames, factor).mean(axis=1) if frames else np.zeros(0)
    states = [('masked', share > MASK_THRESHOLD, dict(facecolor='0.15'))]
    states.append(('partly masked', (share > 0) & (share <= MASK_THRESHOLD), dict(facecolor='0.75')))
    if no_visible_frame is not None:
        crosses = dict(facecolor='white', hatch='xxxx', edgecolor='black', linewidth=0)
        states.append((f'no visible frame ({int(no_visible_frame.sum())})', no_visible_frame[:frames], crosses))
    for label, where, style in states:
        spans = [(start * frame_seconds, (end - start) * frame_seconds) for start, end in _runs(where)]
        axis.broken_barh(spans, (0, 1), label=label, **style)
    axis.set_yticks([])
    axis.set_ylim(0, 1)
    axis.set_ylabel(f'frames of\n{1000 * frame_seconds:g} ms', rotation=0, ha='right', va='center', fontsize=8)
    axis.legend(loc='upper center', bbox_to_anchor=(0.5, -0.75), ncols=len(states), fontsize=8, frameon=False)


def surprise_over_time(
    features: np.ndarray,
    surprise: np.ndarray,
    hop_seconds: float,
    factor: int,
    classes: int | None = None,
    masks: np.ndarray | None = None,
    title: str = '',
):
    """Draw a spectrogram, and below the surprise of each of its tokens for a model that predicts the next one.

    Args:
        features: [D, T].
        surprise: nats of each token [S], of ``factor`` feature frames each; NaN where it was not predicted.
        hop_seconds: length of a feature frame.
        factor: feature frames per token.
        classes: of the tokens, for a line at the uniform baseline; None leaves it out.
        masks: [M] as in :func:`masked_spectrogram`, where the input was masked; None: it was not.
        title: of the picture.
    """
    figure = _figure(height=4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 3])
    seconds, token_seconds = features.shape[1] * hop_seconds, hop_seconds * factor
    _draw_spectrogram(upper, features, seconds, title)
    if masks is not None:
        _draw_blocks(upper, masks, token_seconds if masks.shape[0] < features.shape[1] else hop_seconds)
    edges = np.arange(surprise.shape[0] + 1) * token_seconds
    lower.stairs(surprise, edges, fill=True, facecolor='0.75', edgecolor='0.2', linewidth=0.8)
    if np.isfinite(surprise).any():
        mean = float(np.nanmean(surprise))
        lower.axhline(mean, color='black', linewidth=1, linestyle='--', label=f'mean, {mean:.2f}')
    if classes is not None:
        label = f'uniform baseline, {math.log(classes):.2f}'
        lower.axhline(math.log(classes), color='black', linewidth=1, linestyle=':', label=label)
    lower.set_ylabel('surprise of\nthe next token\n(nats)', fontsize=9)
    lower.set_ylim(bottom=0)
    lower.set_xlim(0, max(seconds, token_seconds))
    lower.set_xlabel(f'seconds (a token: {1000 * token_seconds:g} ms)')
    figure.legend(*lower.get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    return figure


def attention_windows(
    windows: Sequence[tuple[float, float]],
    seen: Sequence[tuple[float, float]],
    frame: int,
    frames: int,
    frame_seconds: float,
    own: Sequence[AttContext | None] | None = None,
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


class _Panel(NamedTuple):
    """One of several plots over the same steps."""

    label: str
    height: float
    draw: Callable  # takes the axis


def learning_curves(curves: Mapping[str, Sequence[tuple[float, float]]], title: str = ''):
    """Draw loss and accuracy for each context over training steps, and the ceiling of the curriculum if there was one.

    The parts of an objective that predicts next tokens have panels of their own: the horizons, and masked tokens
    beside them.

    Args:
        curves: (step, value) pairs by metric name: ``val_loss/ctx_40_0``, ``val_loss/ctx_40_0/next_0``,
            ``val_accuracy/ctx_40_0``, ``train_loss/ctx_40_0``, ``att_context_ceiling_left``; others are ignored.
        title: of the picture.

    Raises:
        ValueError: if there is no loss of any context.
    """
    contexts = contexts_in(curves)
    if not contexts:
        raise ValueError("there is no val_loss/ctx_... or train_loss/ctx_... in these logs")
    panels = _panels(curves, contexts)
    figure = _figure(height=1.0 + 1.25 * sum(panel.height for panel in panels))
    ratios = [panel.height for panel in panels]
    axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True, height_ratios=ratios))
    for axis, panel in zip(axes, panels):
        axis.set_ylabel(panel.label, fontsize=9)
        axis.grid(alpha=0.35, linewidth=0.5)
        panel.draw(axis)
    axes[-1].set_xlabel('optimizer steps')
    figure.suptitle(title, fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3, fontsize=8, frameon=False, handlelength=4)
    return figure


def _panels(curves, contexts: list[str]) -> list[_Panel]:
    """Return the plots that there are curves for."""
    parts = parts_in(curves)
    if not parts:
        loss, accuracy = 'loss (nats per masked frame)', 'masked-token accuracy (%)'
    elif 'masked' in parts:
        loss, accuracy = 'loss (nats, parts\nadded up)', 'accuracy (%)'
    else:
        loss, accuracy = 'loss (nats per\nnext token)', 'next-token accuracy (%)'
    of_parts = [f'/ctx_{context}/{part}' for context in contexts for part in parts]
    panels = [_Panel(loss, 2.2, partial(_draw_losses, curves=curves, contexts=contexts))]
    if any(f'val_loss{name}' in curves for name in of_parts):
        draw = partial(_draw_parts, curves=curves, metric='val_loss', contexts=contexts, parts=parts)
        panels.append(_Panel('loss of each part\n(nats, in validation)', 2.2, draw))
    if any(f'val_accuracy/ctx_{context}' in curves for context in contexts):
        panels.append(_Panel(accuracy, 2.2, partial(_draw_accuracies, curves=curves, contexts=contexts)))
    elif any(f'val_accuracy{name}' in curves for name in of_parts):
        draw = partial(_draw_parts, curves=curves, metric='val_accuracy', contexts=contexts, parts=parts, scale=100)
        panels.append(_Panel('accuracy in each part\n(%)', 2.2, draw))
    ceiling = curves.get('att_context_ceiling_left', ())
    if ceiling:
        panels.append(_Panel('ceiling on the left\ncontext (frames)', 1, partial(_draw_ceiling, ceiling=ceiling)))
    return panels


def contexts_in(curves: Mapping) -> list[str]:
    """Return the contexts' labels that curves are named after, the narrowest first."""
    names = [name.partition('/ctx_')[2] for name in curves if name.startswith(('val_loss/ctx_', 'train_loss/ctx_'))]
    return sorted({name.partition('/')[0] for name in names}, key=_breadth)


def parts_in(curves: Mapping) -> list[str]:
    """Return the parts of an objective that losses are named after, ``masked`` first; empty for masked tokens alone."""
    names = {name.rpartition('/')[2] for name in curves if name.startswith(('val_loss/', 'train_loss/'))}
    return sorted(filter(PART.fullmatch, names), key=lambda part: int(part.partition('next_')[2] or -1))


def _breadth(label: str) -> tuple:
    """Sort contexts from narrow to wide, and after them the groups of chunks that a sampler draws (``chunk_8_to_15``)."""
    kind, _, sizes = label.partition('chunk_')
    sides = [side for side in (sizes or kind).split('_') if side != 'to']
    return bool(sizes), [math.inf if side == 'unlimited' else int(side) for side in sides]


def _named(label: str) -> str:
    kind, _, sizes = label.partition('chunk_')
    return f"chunks of {sizes.replace('_', ' ')}" if sizes else f"[{kind.replace('_', ', ')}]"


def _style_of(index: int) -> dict:
    """Return the line of the context with this index."""
    return dict(linestyle=LINE_STYLES[index % len(LINE_STYLES)], color=GREYS[index % len(GREYS)], linewidth=1.4)


def _marks_of(index: int) -> dict:
    """Return the marks of its validations; where lines lie on each other they stand one inside the other."""
    size = max(8 - 1.5 * index, 3)
    return dict(marker=MARKERS[index % len(MARKERS)], markersize=size, markerfacecolor='none')


def _draw_losses(axis, curves, contexts: list[str]) -> None:
    for index, context in enumerate(contexts):
        trained = _smooth(curves.get(f'train_loss/ctx_{context}', ()))
        validated = curves.get(f'val_loss/ctx_{context}', ())
        if trained:
            label = f'{_named(context)} in training, smoothed'
            axis.plot(*zip(*trained), **{**_style_of(index), 'linewidth': 0.7}, alpha=0.7, label=label)
        if validated:
            label = f'{_named(context)} in validation'
            axis.plot(*zip(*sorted(validated)), **_style_of(index), **_marks_of(index), label=label)


def _draw_accuracies(axis, curves, contexts: list[str]) -> None:
    for index, context in enumerate(contexts):
        accuracy = curves.get(f'val_accuracy/ctx_{context}', ())
        if accuracy:
            steps, shares = zip(*sorted(accuracy))
            axis.plot(steps, [100 * share for share in shares], **_style_of(index), **_marks_of(index))


def _draw_parts(axis, curves, metric: str, contexts: list[str], parts: list[str], scale: float = 1) -> None:
    """Draw the parts' curves as thin lines, in each context's style, and name each bundle of lines at its end."""
    ends: dict[str, list[float]] = {}
    for part in parts:
        for index, context in enumerate(contexts):
            curve = curves.get(f'{metric}/ctx_{context}/{part}', ())
            if curve:
                steps, values = zip(*sorted(curve))
                thin = {**_style_of(index), 'linewidth': 0.8, 'marker': '.', 'markersize': 3}
                axis.plot(steps, [scale * value for value in values], **thin)
                ends.setdefault(part, []).append(scale * values[-1])
    _name_ends(axis, {part: sum(values) / len(values) for part, values in ends.items()})


def _name_ends(axis, heights: Mapping[str, float]) -> None:
    """Write names at the right edge of a plot, each near its height and none over another."""
    bottom, top = axis.get_ylim()
    names = sorted((name for name in heights if math.isfinite(heights[name])), key=heights.get)
    line, written = 0.06 * (top - bottom), {}
    for index, name in enumerate(names):  # from below: above the one before
        written[name] = max(heights[name], written[names[index - 1]] + line if index else bottom)
    for index, name in enumerate(reversed(names)):  # and from above, where that ran out of the plot
        written[name] = min(written[name], top - index * line)
        axis.annotate(name, (1.01, written[name]), xycoords=('axes fraction', 'data'), va='center', fontsize=8)
    axis.set_ylim(bottom, top)


def _draw_ceiling(axis, ceiling) -> None:
    steps, lefts = zip(*sorted(ceiling))
    axis.step(steps, [math.nan if left < 0 else left for left in lefts], where='post', color='black')
    axis.set_ylim(bottom=0)


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
