# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""What a model knows in each attention context, on the same masks: in validation, and in ``evaluate_contexts.py``.

Shapes: N frames that count, C classes, H codebooks.
"""

import warnings
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

import torch
import torchmetrics
from torchmetrics.classification import MulticlassAccuracy

from nemo.collections.asr.losses.ssl_losses.mlm import IGNORED_TARGET
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, context_label
from nemo.collections.asr.parts.att_context.encoder_protocol import tightest_window_of
from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms, look_ahead_text
from nemo.collections.asr.parts.att_context.windows import STYLES, Window, tightest_window
from nemo.collections.asr.parts.ssl_reports.audit import audit_masks, layer_windows_of
from nemo.collections.asr.parts.ssl_reports.batch_record import BatchRecord
from nemo.collections.asr.parts.ssl_reports.fixed_masks import FixedMasks, utterance_seeds
from nemo.collections.asr.parts.ssl_reports.model_figures import attention_frame_ms
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


class FrameScores(NamedTuple):
    """How well the frames that count were predicted; over several codebooks the mean."""

    negative_log_likelihood: torch.Tensor  # [N] float32
    correct: torch.Tensor  # [N] float32: the share of the codebooks' tokens that were the likeliest
    utterances: torch.Tensor  # [N] int64: index in the batch

    @classmethod
    def of(cls, predictions: MaskedPredictions, loss) -> 'FrameScores':
        """Score predictions of frames that all count, by the loss of their model; there may be none."""
        log_probs, targets, utterances = predictions
        correct = (log_probs.argmax(dim=1) == targets).float()
        correct = correct.mean(dim=1) if targets.dim() == 2 else correct
        return cls(loss.of_frames(log_probs, targets, reduction='none'), correct, utterances)


def predictions_in_contexts(
    model, batch, contexts: Sequence, seed: int, window: Optional[Window] = None
) -> Iterator[tuple[list, MaskedPredictions, BatchRecord]]:
    """Predict the masked frames of a batch in each context, on the same masks.

    The masks are a function of the seed, each utterance's audio, the masking's configuration and ``window``.

    Args:
        model: an ``EncDecMaskedTokenPredModel`` in eval mode.
        batch: as its data loader gives it.
        contexts: that its encoder can follow.
        seed: of the masks.
        window: that the masks are drawn for; None: the tightest of ``contexts``, so that what is masked can be
            answered in each.
    """
    window = tightest_of(model.encoder, contexts) if window is None else window
    masking = FixedMasks(model.mask_processor, utterance_seeds(*signal_of(batch), seed), window)
    for context in contexts:
        with model.encoder.using_att_context_size(context):
            predictions, record = model.predict_batch(batch, masking)
            yield context, _of_frames_that_count(predictions), record


def _of_frames_that_count(predictions: MaskedPredictions) -> MaskedPredictions:
    """Leave the frame out that stands for none; N may then be 0."""
    if predictions.targets.shape[0] > 1:
        return predictions
    counted = (predictions.targets != IGNORED_TARGET).flatten()[:1]
    return MaskedPredictions(*(part[counted] for part in predictions))


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
        self.num_classes = getattr(model.quantizer, 'num_classes', None)
        if not hasattr(model.loss, 'of_frames') or self.num_classes is None:
            raise ValueError(
                "model.validate_contexts must know which frames count and how many classes there are; the loss "
                f"{type(model.loss).__name__} and the quantizer {type(model.quantizer).__name__} do not tell"
            )
        self._running = parse_contexts(contexts, model.encoder)
        self._tell_look_ahead(model)
        self._metrics: list[dict[str, torchmetrics.Metric]] = []  # of each data loader
        self._results: list[dict[str, torch.Tensor]] = []

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
        self._metrics = [self._new_metrics(model) for _ in range(loaders)]
        self._results = []

    def _new_metrics(self, model) -> dict[str, torchmetrics.Metric]:
        metrics, has_windows = {'masked_share': WeightedMean()}, bool(layer_windows_of(model.encoder))
        for label in map(context_label, self._running):
            metrics[f'loss/ctx_{label}'] = WeightedMean()
            metrics[f'accuracy/ctx_{label}'] = MulticlassAccuracy(
                self.num_classes, average='micro', validate_args=False
            )
            if has_windows:
                metrics[f'unanswerable_share/ctx_{label}'] = WeightedMean()
        return {name: metric.to(model.device) for name, metric in metrics.items()}

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
        for context, predictions, record in predictions_in_contexts(
            model, batch, self._running, self.seed, self.window
        ):
            label, frames = context_label(context), predictions.utterances.shape[0]
            likelihood = model.loss.of_frames(predictions.log_probs, predictions.targets, reduction='none')
            total = likelihood.sum(dtype=torch.float64)
            metrics[f'loss/ctx_{label}'].update(total, frames)
            if frames:
                guesses = predictions.log_probs.argmax(dim=1)
                metrics[f'accuracy/ctx_{label}'].update(guesses.flatten(), predictions.targets.flatten())
            losses.append(total.float() / max(frames, 1))
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
        labels = [context_label(context) for context in self._running]
        for label in labels:
            found[f'{mode}_perplexity/ctx_{label}'] = found[f'{mode}_loss/ctx_{label}'].exp()
        for name in ('loss', 'accuracy'):
            found[f'{mode}_{name}'] = torch.stack([found[f'{mode}_{name}/ctx_{label}'] for label in labels]).mean()
        found[f'{mode}_perplexity'] = found[f'{mode}_loss'].exp()
        if found[f'{mode}_loss'].isnan():
            logging.warning(f"{mode}_loss is NaN: no masked frame counted, or the model's outputs are not finite")
        return found

    def summary(self, mode: str, dataloader_idx: int = 0) -> dict:
        """Return what NeMo's ``multi_validation_epoch_end`` returns: the loss to monitor, and all that is logged.

        The plain loss and accuracy are the means over the contexts.
        """
        if not self._results:  # not in a trainer's loop
            self.finish(mode)
        found = self._results[dataloader_idx]
        return {f'{mode}_loss': found[f'{mode}_loss'], 'log': dict(found)}


def _parse_mask_options(options) -> tuple[int, Optional[Window]]:
    options = dict(options or {})
    check_known('model.validation_masks', options, VALIDATION_MASK_KEYS)
    seed, left = options.get('seed', 0), options.get('left_context')
    for name, value, lowest in (('seed', seed, 0), ('left_context', left, -1)):
        optional = name == 'left_context' and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
            raise ValueError(f"model.validation_masks.{name} is {value!r}; it must be a whole number from {lowest} on")
    return seed, None if left is None else Window(AttContext(left, 0))
