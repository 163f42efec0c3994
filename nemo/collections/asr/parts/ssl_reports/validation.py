# SPDX-License-Identifier: Apache-2.0
"""What a model knows in each attention context, on the same masks: in validation, and in ``evaluate_contexts.py``.

Shapes: N frames that count, C classes, H codebooks.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torchmetrics

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, context_label
from nemo.collections.asr.parts.att_context.encoder_protocol import tightest_window_of
from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms, look_ahead_text
from nemo.collections.asr.parts.att_context.windows import STYLES, Window, tightest_window
from nemo.collections.asr.parts.ssl_reports.audit import audit_masks, layer_windows_of
from nemo.collections.asr.parts.ssl_reports.batch_record import BatchRecord
from nemo.collections.asr.parts.ssl_reports.fixed_masks import FixedMasks, utterance_seeds
from nemo.collections.asr.parts.ssl_reports.model_figures import attention_frame_ms
from nemo.collections.asr.parts.ssl_reports.scores import (
    MASKED,
    NEXT_OF_ALL,
    FrameScores,
    parts_of,
    scores_of,
    without_placeholder,
)
from nemo.collections.asr.parts.utils.known_keys import VALIDATION_MASK_KEYS, check_known
from nemo.collections.asr.parts.utils.masked_frames import MaskedPredictions
from nemo.utils import logging

CHOICES = ('all', 'first')


def parse_contexts(value, encoder, field: str = 'model.validate_contexts') -> list:
    """Return the contexts to run, in order.

    Args:
        value: ``all`` that the encoder is configured with, the ``first`` of them, or a list of contexts.
        encoder: a ``ConformerEncoder``.
        field: the config key or option to name in an error.

    Raises:
        ValueError: naming the item, if it is no context, comes twice, or the encoder's attention cannot follow it.
    """
    if not hasattr(encoder, 'using_att_context_size'):
        raise ValueError(f"{field} is {value!r}, but {type(encoder).__name__} has no attention contexts")
    known = [list(context) for context in encoder.att_context_size_all]
    if isinstance(value, str):
        if value not in CHOICES:
            raise ValueError(f"{field} is {value!r}; it must be one of {CHOICES}, or a list of contexts")
        return known if value == 'all' else known[:1]
    try:
        items = list(value)
    except TypeError:
        raise ValueError(f"{field} is {value!r}; it must be one of {CHOICES}, or a list of contexts") from None
    contexts = [_checked(item, encoder, f'{field}[{index}]') for index, item in enumerate(items)]
    if not contexts or any(context in contexts[:index] for index, context in enumerate(contexts)):
        raise ValueError(f"{field} is {[list(context) for context in contexts]}; it needs contexts, each once")
    return contexts


def _checked(item, encoder, field: str) -> list:
    context = encoder.parse_att_context_size(item, field)
    try:
        encoder.check_att_context_size(context)
    except ValueError as error:
        raise ValueError(f"{field}: the encoder cannot follow {list(context)}: {error}") from error
    return list(context)


def tightest_of(encoder, contexts: Sequence) -> Window:
    """Return a window that lies within what every layer sees in each of several batches' contexts."""
    windows = []
    for context in contexts:
        with encoder.using_att_context_size(context):
            windows.append(tightest_window_of(encoder) or Window(AttContext(UNLIMITED, 0)))
    return tightest_window(windows)


def passes_in_contexts(
    model, batch, contexts: Sequence, seed: int, window: Window | None = None, masked: bool = True
) -> Iterator[tuple[list, BatchRecord]]:
    """Run a batch in each context, on the same masks; what is done with a pass is done within its context.

    The masks are a function of the seed, each utterance's audio, the masking's configuration and ``window``.

    Args:
        model: an ``EncDecMaskedTokenPredModel`` in eval mode.
        batch: as its data loader gives it.
        contexts: that its encoder can follow.
        seed: of the masks.
        window: that the masks are drawn for; None: the tightest of ``contexts``, so that what is masked can be
            answered in each.
        masked: whether anything is masked.
    """
    masking = None
    if masked:
        window = tightest_of(model.encoder, contexts) if window is None else window
        masking = FixedMasks(model.mask_processor, utterance_seeds(*signal_of(batch), seed), window)
    for context in contexts:
        with model.encoder.using_att_context_size(context):
            yield context, model.encode_batch(batch, masking)


def predictions_in_contexts(
    model, batch, contexts: Sequence, seed: int, window: Window | None = None
) -> Iterator[tuple[list, MaskedPredictions, BatchRecord]]:
    """Predict the masked frames of a batch in each context; arguments as in :func:`passes_in_contexts`."""
    for context, record in passes_in_contexts(model, batch, contexts, seed, window):
        yield context, without_placeholder(model.predictions_of(record)), record


def signal_of(batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch's clean samples [B, N] (or features, [B, D, T], where it has no samples) and lengths [B]."""
    return (batch.audio, batch.audio_len) if hasattr(batch, 'audio') else (batch[0], batch[1])


class WeightedMean(torchmetrics.Metric):
    """The mean of values with weights, over batches and ranks; NaN without any weight, and if a value is NaN."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state('total', torch.zeros((), dtype=torch.float64), dist_reduce_fx='sum')
        self.add_state('weight', torch.zeros((), dtype=torch.float64), dist_reduce_fx='sum')

    def update(self, total: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the sum of the values times their weights, and of the weights."""
        self.total += total
        self.weight += weight

    def compute(self) -> torch.Tensor:
        """Return the mean, float32."""
        return (self.total / self.weight).float()


class ContextValidation:
    """Runs validation and test batches in several contexts, and sums up over batches and ranks.

    Args:
        model: an ``EncDecMaskedTokenPredModel``.
        contexts: ``all``, ``first`` or a list; see :func:`parse_contexts`.
        masks: ``seed`` of the masks and the ``left_context`` they are drawn for, None for the tightest of the
            contexts; in a config, ``model.validation_masks``.

    Raises:
        ValueError: naming the config key, its value and what is allowed.
    """

    def __init__(self, model, contexts='all', masks=None):
        self._wanted = contexts
        self.seed, self.window = _parse_mask_options(masks)
        if not hasattr(model.loss, 'of_frames') or getattr(model.quantizer, 'num_classes', None) is None:
            raise ValueError(
                "model.validate_contexts must know which frames count and how many classes there are; the loss "
                f"{type(model.loss).__name__} and the quantizer {type(model.quantizer).__name__} do not tell"
            )
        self._running = parse_contexts(contexts, model.encoder)
        self._tell_look_ahead(model)
        self._metrics: list[dict[str, torchmetrics.Metric]] = []  # of each data loader
        self._results: list[dict[str, torch.Tensor]] = []
        self._next_token_weight: float | None = None  # where the loss is the sum of two parts

    @property
    def contexts(self) -> list:
        """Those that the next validation runs in."""
        return self._running

    def _tell_look_ahead(self, model) -> None:
        """Log what the contexts of validation mean in latency."""
        frame_ms = attention_frame_ms(model)
        if frame_ms is not None and getattr(model.encoder, 'att_context_style', None) in STYLES:
            waits = (look_ahead_text(look_ahead_ms(model.encoder, context, frame_ms)) for context in self._running)
            contexts = ', '.join(f'{context} (look-ahead {wait})' for context, wait in zip(self._running, waits))
            logging.info(f'Validation in contexts {contexts}')

    def start(self, model, loaders: int) -> None:
        """Forget what was summed up; every rank makes ready for every data loader, whatever it will get to see."""
        by_hand = model.att_context_set_by_hand
        self._running = parse_contexts(self._wanted, model.encoder) if by_hand is None else [by_hand]
        self._next_token_weight = model.next_token_weight if model.objective == 'both' else None
        self._metrics = [self._new_metrics(model) for _ in range(loaders)]
        self._results = []

    def _new_metrics(self, model) -> dict[str, torchmetrics.Metric]:
        masks = [] if not model.predicts_masked_tokens else ['masked_share']
        has_windows = masks and layer_windows_of(model.encoder)
        names = masks + [
            f'unanswerable_share/ctx_{context_label(context)}' for context in self._running if has_windows
        ]
        for label in map(context_label, self._running):
            places = [place for part in parts_of(model) for place in _places(model.objective, label, part)]
            names += [f'{name}/{place}' for place in places for name in ('loss', 'accuracy')]
        return {name: WeightedMean().to(model.device) for name in dict.fromkeys(names)}

    def step(
        self, model, batch, dataloader_idx: int, after_each: Callable = lambda model, record: None
    ) -> torch.Tensor:
        """Run a batch in every context; returns its loss, the mean over the contexts.

        Args:
            model: the model.
            batch: as its data loader gives it.
            dataloader_idx: which of the data loaders that is.
            after_each: called with the model and the record of its forward pass, within each context.
        """
        if dataloader_idx >= len(self._metrics):  # a step by hand, outside of a trainer's loop
            self.start(model, dataloader_idx + 1)
        metrics, losses = self._metrics[dataloader_idx], []
        passes = passes_in_contexts(
            model, batch, self._running, self.seed, self.window, masked=model.predicts_masked_tokens
        )
        for context, record in passes:
            label, scores = context_label(context), scores_of(model, record)
            for part, score in scores.items():
                frames = score.utterances.shape[0]
                for place in _places(model.objective, label, part):
                    metrics[f'loss/{place}'].update(score.negative_log_likelihood.sum(dtype=torch.float64), frames)
                    metrics[f'accuracy/{place}'].update(score.correct.sum(dtype=torch.float64), frames)
            losses.append(_loss_of(model, scores))
            if model.predicts_masked_tokens:
                self._count_masks(record, layer_windows_of(model.encoder), metrics, label, first=len(losses) == 1)
            after_each(model, record)
        return torch.stack(losses).mean()

    @staticmethod
    def _count_masks(record: BatchRecord, windows, metrics, label: str, first: bool) -> None:
        audit = audit_masks(record.masks, record.mask_lengths, record.factor, windows, record.threshold)
        if first:  # the masks are the same in every context
            metrics['masked_share'].update(audit.mask_frames_masked, audit.mask_frames)
        if windows:
            unanswerable = torch.stack(list(audit.unanswerable.values())).max()
            metrics[f'unanswerable_share/ctx_{label}'].update(unanswerable, audit.frames_masked)

    def finish(self, mode: str) -> None:
        """Add up over the ranks, which must all call this, whether they had batches or not."""
        self._results = [self._result(metrics, mode) for metrics in self._metrics]

    def _result(self, metrics, mode: str) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():  # a rank without batches computes before any update, as it should
            warnings.filterwarnings('ignore', message='.*``compute`` method.*before the ``update`` method')
            found = {f'{mode}_{name}': metric.compute() for name, metric in metrics.items()}
        places = [name.removeprefix('loss/') for name in metrics if name.startswith('loss/')]
        found.update({f'{mode}_perplexity/{place}': found[f'{mode}_loss/{place}'].exp() for place in places})
        labels = [context_label(context) for context in self._running]
        if self._next_token_weight is not None:  # the sum of two losses has neither accuracy nor perplexity
            for label in labels:
                masked, following = (found[f'{mode}_loss/ctx_{label}/{part}'] for part in (MASKED, NEXT_OF_ALL))
                found[f'{mode}_loss/ctx_{label}'] = masked + self._next_token_weight * following
        for name in ('loss', 'accuracy') if self._next_token_weight is None else ('loss',):
            found[f'{mode}_{name}'] = torch.stack([found[f'{mode}_{name}/ctx_{label}'] for label in labels]).mean()
        if self._next_token_weight is None:
            found[f'{mode}_perplexity'] = found[f'{mode}_loss'].exp()
        if found[f'{mode}_loss'].isnan():
            logging.warning(f"{mode}_loss is NaN: no frame counted, or the model's outputs are not finite")
        return found

    def summary(self, mode: str, dataloader_idx: int = 0) -> dict:
        """Return what NeMo's ``multi_validation_epoch_end`` returns: the loss to monitor, and all that is logged.

        The plain loss and accuracy are the means over the contexts.
        """
        if not self._results:  # not in a trainer's loop
            self.finish(mode)
        found = self._results[dataloader_idx]
        return {f'{mode}_loss': found[f'{mode}_loss'], 'log': dict(found)}


def _places(objective: str, label: str, part: str) -> list[str]:
    """Return what a part's figures in a context are filed under; the last place sums up over all horizons."""
    if objective == 'masked':
        return [f'ctx_{label}']
    if part == MASKED:
        return [f'ctx_{label}/{part}']
    return [f'ctx_{label}/{part}', f'ctx_{label}' if objective == 'next_token' else f'ctx_{label}/{NEXT_OF_ALL}']


def _loss_of(model, scores: dict[str, FrameScores]) -> torch.Tensor:
    """Return the objective's loss of a forward pass, a scalar; 0 of a part without frames."""
    totals = {part: score.negative_log_likelihood.sum(dtype=torch.float64) for part, score in scores.items()}
    frames = {part: score.utterances.shape[0] for part, score in scores.items()}
    masked = totals[MASKED].float() / max(frames[MASKED], 1) if MASKED in scores else None
    if not model.predicts_next_tokens:
        return masked
    horizons = [part for part in scores if part != MASKED]
    total, count = (sum(values[part] for part in horizons) for values in (totals, frames))
    return model.combined_loss(masked, total.float() / max(count, 1))


def _parse_mask_options(options) -> tuple[int, Window | None]:
    options = dict(options or {})
    check_known('model.validation_masks', options, VALIDATION_MASK_KEYS)
    seed, left = options.get('seed', 0), options.get('left_context')
    for name, value, lowest in (('seed', seed, 0), ('left_context', left, -1)):
        optional = name == 'left_context' and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
            raise ValueError(f"model.validation_masks.{name} is {value!r}; it must be a whole number from {lowest} on")
    return seed, None if left is None else Window(AttContext(left, 0))
