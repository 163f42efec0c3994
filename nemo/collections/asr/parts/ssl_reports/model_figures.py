# SPDX-License-Identifier: Apache-2.0
"""Figures of a model: its masks, the surprise of tokens, attention windows, learning curves; in TensorBoard, too.

Shapes: D features, T feature frames, M mask frames, S target frames.
"""

from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.receptive_field import (
    look_ahead_ms,
    look_ahead_text,
    seen_through_layers,
)
from nemo.collections.asr.parts.att_context.visible_frames import masked_share_per_frame, no_visible_frame
from nemo.collections.asr.parts.att_context.windows import STYLES, Window, tightest_window_of
from nemo.collections.asr.parts.objectives.record import BatchRecord
from nemo.collections.asr.parts.ssl_reports import figures


class SeenUtterance(NamedTuple):
    """One utterance as a model's forward pass saw it."""

    features: np.ndarray  # [D, T], clean
    masks: np.ndarray | None  # [M], 1 where masked; None: the model's objective masks nothing
    surprise: np.ndarray | None  # nats of each token [S], NaN where not predicted; None: it predicts no next tokens
    window: Window  # what the tightest layer saw in the pass
    context: list | None  # of the pass; None: the encoder has none


def hop_seconds(model) -> float:
    """Return the length of a feature frame of a model's preprocessor."""
    featurizer = model.preprocessor.featurizer
    return featurizer.hop_length / featurizer.sample_rate


def attention_frame_ms(model) -> float | None:
    """Return the length of an attention frame, in milliseconds; None if preprocessor or encoder lacks it."""
    try:
        return 1000 * hop_seconds(model) * model.encoder.subsampling_factor
    except AttributeError:
        return None


def look_ahead_title(model, context) -> str:
    """Return a context with the look-ahead of its output, for titles: ``[28, 13], look-ahead 1040 ms``."""
    return f'{list(context)}, look-ahead {look_ahead_text(look_ahead_ms(model.encoder, context, attention_frame_ms(model)))}'


def seen_utterance(model, record: BatchRecord, index: int = 0) -> SeenUtterance:
    """Return an utterance as a forward pass saw it.

    Args:
        model: an ``EncDecMaskedTokenPredModel``, in the context of the pass.
        record: of the pass.
        index: of the utterance.
    """
    features = record.features[index, :, : int(record.feature_lengths[index])].detach().float().cpu().numpy()
    masks = surprise = None
    if model.objectives.masks:
        masks = record.masks[index, 0, : int(record.mask_lengths[index])].float().cpu().numpy()
    if record.encoded is not None:
        surprise = model.objectives.surprise(record, index)
    window = tightest_window_of(model.encoder) or Window(AttContext(UNLIMITED, UNLIMITED))
    context = getattr(model.encoder, 'att_context_size', None)
    return SeenUtterance(features, masks, surprise, window, None if context is None else list(context))


def draw_masks(model, utterance: SeenUtterance, title: str = ''):
    """Draw what a model masked of an utterance; see ``masked_spectrogram``."""
    factor = model.encoder.subsampling_factor
    masks = torch.from_numpy(utterance.masks).view(1, 1, -1)
    share = masked_share_per_frame(masks, model.mask_frames_per_attention_frame)
    lost = no_visible_frame(share, utterance.window)[0].numpy()
    return figures.masked_spectrogram(utterance.features, utterance.masks, hop_seconds(model), factor, lost, title)


def draw_surprise(model, utterance: SeenUtterance, title: str = ''):
    """Draw the surprise of each token of an utterance; see ``surprise_over_time``."""
    return figures.surprise_over_time(
        utterance.features,
        utterance.surprise,
        hop_seconds(model),
        model.encoder.subsampling_factor,
        model.quantizer.num_classes,
        utterance.masks,
        title,
    )


def draw_utterance(model, utterance: SeenUtterance, of: str) -> dict:
    """Return the pictures of an utterance that the model's objective makes, by their names.

    Args:
        model: that saw it.
        utterance: as it was seen.
        of: what it is, for the titles.
    """
    drawn = {}
    if utterance.masks is not None:
        drawn['masked_spectrogram'] = draw_masks(model, utterance, of)
    if utterance.surprise is not None:
        drawn['surprise'] = draw_surprise(model, utterance, f'{of}, in context {utterance.context}')
    return drawn


def draw_attention(
    encoder, frame: int | None, frames: int, frame_seconds: float, att_context_size=None, title: str = ''
):
    """Draw what a frame attends to in each layer of an encoder; see ``attention_windows``.

    Args:
        encoder: a ``ConformerEncoder``.
        frame: the attention frame; None takes one at three quarters of the utterance.
        frames: of the utterance.
        frame_seconds: length of an attention frame.
        att_context_size: the batch's context; None takes the encoder's present one.
        title: of the picture.

    Raises:
        ValueError: if the frame is not in the utterance, or the encoder's attention has no windows.
    """
    frame = 3 * (frames - 1) // 4 if frame is None else frame
    if not 0 <= frame < frames:
        raise ValueError(f"frame is {frame}; the utterance has attention frames 0 to {frames - 1}")
    if encoder.att_context_style not in STYLES:
        raise ValueError(f"att_context_style is {encoder.att_context_style}; windows are known for {STYLES}")
    windows = [window.bounds(frame) for window in encoder.effective_windows(att_context_size)]
    seen = seen_through_layers(encoder, frame, att_context_size)
    own = encoder.layer_att_contexts()
    return figures.attention_windows(windows, seen, frame, frames, frame_seconds, own, title)


class ContextFigures:
    """Puts pictures of each validation into TensorBoard; on the first rank, where there is TensorBoard.

    ``contexts/masked_spectrogram`` or, of next tokens, ``contexts/surprise`` (both, if the objective is both) and
    ``contexts/attention_windows`` of the first utterance, and ``contexts/learning_curves`` of the validations in this
    process.
    """

    def __init__(self):
        self._utterance: SeenUtterance | None = None
        self._curves: dict[str, list[tuple[float, float]]] = {}

    def keep(self, model, record: BatchRecord) -> None:
        """Keep the first utterance of a validation; to be called after each of its forward passes, in its context.

        On every rank: where weights are sharded all ranks must decode together.
        """
        if self._utterance is None and _experiments(model.trainer):
            self._utterance = seen_utterance(model, record)

    def log(self, model) -> None:
        """Draw and log, at the end of a validation."""
        trainer, utterance = model.trainer, self._utterance
        self._utterance = None
        if utterance is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        for name, figure in self._draw(model, utterance).items():
            for experiment in _experiments(trainer):
                experiment.add_figure(f'contexts/{name}', figure, global_step=trainer.global_step, close=False)

    def _draw(self, model, utterance: SeenUtterance) -> dict:
        step, encoder = model.trainer.global_step, model.encoder
        drawn = draw_utterance(model, utterance, f'first validation utterance, step {step}')
        if getattr(encoder, 'att_context_style', None) in STYLES:
            frames = max(utterance.features.shape[1] // encoder.subsampling_factor, 1)
            context = AttContext.parse(encoder.att_context_size)
            drawn['attention_windows'] = draw_attention(
                encoder,
                frame=None,
                frames=frames,
                frame_seconds=attention_frame_ms(model) / 1000,
                title=f'attention in context {look_ahead_title(model, context)}',
            )
        for name, value in model.trainer.callback_metrics.items():
            if name == 'att_context_ceiling_left' or name.startswith(('val_loss/ctx_', 'val_accuracy/ctx_')):
                self._curves.setdefault(name, []).append((step, float(value)))
        if figures.contexts_in(self._curves):
            drawn['learning_curves'] = figures.learning_curves(self._curves)
        return drawn


def _experiments(trainer) -> list:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
