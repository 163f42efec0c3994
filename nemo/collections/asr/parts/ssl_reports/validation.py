# SPDX-License-Identifier: Apache-2.0
"""Validation in each attention context, on the same features, targets and masks.

Shapes: N loss positions, C classes, H codebooks.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, context_label
from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms, look_ahead_text
from nemo.collections.asr.parts.att_context.windows import STYLES, Window, tightest_window, tightest_window_of
from nemo.collections.asr.parts.objectives.base import FrameScores
from nemo.collections.asr.parts.objectives.record import BatchInputs, BatchRecord
from nemo.collections.asr.parts.ssl_reports.audit import audit_masks, layer_windows_of
from nemo.collections.asr.parts.ssl_reports.fixed_masks import FixedMasks, utterance_seeds
from nemo.collections.asr.parts.ssl_reports.model_figures import attention_frame_ms
from nemo.collections.asr.parts.utils.config_keys import ValidationMasks
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
    model,
    batch,
    contexts: Sequence,
    seed: int,
    window: Window | None = None,
    masked: bool = True,
    inputs: BatchInputs | None = None,
) -> Iterator[tuple[list, BatchRecord]]:
    """Encode a batch in each context, on the same features, targets and masks; the caller is within the context.

    The masks are a function of the seed, each utterance's audio, the masking's configuration and ``window``.

    Args:
        model: an ``EncDecMaskedTokenPredModel`` in eval mode.
        batch: as its data loader gives it.
        contexts: that its encoder can follow.
        seed: of the masks.
        window: that the masks are drawn for; None: the tightest of ``contexts``, so that masked frames have a visible
            one in each.
        masked: whether anything is masked.
        inputs: the features of the batch, where they are there already.
    """
    masking = None
    if masked:
        window = tightest_of(model.encoder, contexts) if window is None else window
        masking = FixedMasks(model.mask_processor, utterance_seeds(*signal_of(batch), seed), window)
    inputs = model.inputs_of(batch) if inputs is None else inputs  # after the seeds: dither changes the audio in place
    for context in contexts:
        with model.encoder.using_att_context_size(context):
            yield context, model.encode(inputs, masking)


def signal_of(batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch's clean samples [B, N] (or features, [B, D, T], where it has no samples) and lengths [B]."""
    return (batch.audio, batch.audio_len) if hasattr(batch, 'audio') else (batch[0], batch[1])


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
        masks = ValidationMasks.parse(masks)
        self.seed = masks.seed
        self.window = None if masks.left_context is None else Window(AttContext(masks.left_context, 0))
        if not hasattr(model.loss, 'of_frames') or getattr(model.quantizer, 'num_classes', None) is None:
            raise ValueError(
                "model.validate_contexts needs a loss with of_frames and a quantizer with num_classes; the loss is "
                f"{type(model.loss).__name__}, the quantizer {type(model.quantizer).__name__}"
            )
        self._running = parse_contexts(contexts, model.encoder)
        self._tell_look_ahead(model)
        self._names: list[str] = []  # of the means
        self._sums: torch.Tensor | None = None  # [loaders, means, 2]: the values times their weights, and the weights
        self._results: list[dict[str, torch.Tensor]] = []

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
        """Forget all sums; every rank makes ready for every data loader, whatever batches it will have."""
        override = model.att_context_override
        self._running = parse_contexts(self._wanted, model.encoder) if override is None else [list(override)]
        self._objectives, self._names = model.objectives, []
        if model.objectives.masks:
            self._names.append('masked_share')
            if layer_windows_of(model.encoder):
                self._names += [
                    f'masking/no_visible_frame_in_window/ctx_{context_label(each)}' for each in self._running
                ]
        places = [place for context in self._running for place in self._places(context_label(context))]
        self._names += [f'{name}/{place}' for place in places for name in ('loss', 'accuracy')]
        self._sums = torch.zeros(loaders, len(self._names), 2, dtype=torch.float64, device=model.device)
        self._results = []

    def _places(self, label: str) -> list[str]:
        """Return what the figures of a context are filed under: each objective, and each of its parts."""
        found = []
        for objective in self._objectives:
            found += [self._place(objective, label), *(f'ctx_{label}/{part}' for part in objective.parts)]
        return found

    def _place(self, objective, label: str) -> str:
        name = self._objectives.name_of(objective)
        return f'ctx_{label}/{name}' if name else f'ctx_{label}'

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
        if self._sums is None or dataloader_idx >= len(self._sums):  # a step outside of a trainer's loop
            self.start(model, dataloader_idx + 1)
        losses, masks = [], model.objectives.masks
        for context, record in passes_in_contexts(model, batch, self._running, self.seed, self.window, masks):
            label = context_label(context)
            of_objectives = {
                objective: self._count_scores(dataloader_idx, objective, label, scores)
                for objective, scores in model.objectives.scores(record).items()
            }
            losses.append(model.objectives.weighted(of_objectives))
            if masks:
                self._count_masks(dataloader_idx, record, layer_windows_of(model.encoder), label, len(losses) == 1)
            after_each(model, record)
        return torch.stack(losses).mean()

    def _add(self, loader: int, name: str, total, weight) -> None:
        """Add to a mean the sum of values times their weights, and of the weights: tensors or numbers."""
        sums = self._sums[loader, self._names.index(name)]
        sums[0] += total
        sums[1] += weight

    def _count_scores(self, loader: int, objective, label: str, scores: dict[str, FrameScores]) -> torch.Tensor:
        """Add the scores of an objective in a context; returns its loss, 0 where there are no frames."""
        lost, frames = 0, 0
        for part, score in scores.items():
            whole, count = self._place(objective, label), score.utterances.shape[0]
            for place in [whole, f'ctx_{label}/{part}'] if part in objective.parts else [whole]:
                self._add(loader, f'loss/{place}', score.negative_log_likelihood.sum(dtype=torch.float64), count)
                self._add(loader, f'accuracy/{place}', score.correct.sum(dtype=torch.float64), count)
            lost, frames = lost + score.negative_log_likelihood.sum(dtype=torch.float64), frames + count
        return lost.float() / max(frames, 1)

    def _count_masks(self, loader: int, record: BatchRecord, windows, label: str, first: bool) -> None:
        audit = audit_masks(record.masks, record.mask_lengths, record.factor, windows, record.threshold)
        if first:  # the masks are the same in every context
            self._add(loader, 'masked_share', audit.mask_frames_masked, audit.mask_frames)
        if windows:
            no_visible = torch.stack(list(audit.no_visible_frame.values())).max()
            self._add(loader, f'masking/no_visible_frame_in_window/ctx_{label}', no_visible, audit.frames_masked)

    def finish(self, mode: str) -> None:
        """Add up over the ranks, which must all call this, whether they had batches or not, in one reduction."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        self._results = [self._result(sums, mode) for sums in self._sums]

    def _result(self, sums: torch.Tensor, mode: str) -> dict[str, torch.Tensor]:
        means = (sums[:, 0] / sums[:, 1]).float()
        found = {f'{mode}_{name}': mean for name, mean in zip(self._names, means.unbind(), strict=True)}
        places = [name.removeprefix('loss/') for name in self._names if name.startswith('loss/')]
        found.update({f'{mode}_perplexity/{place}': found[f'{mode}_loss/{place}'].exp() for place in places})
        labels = [context_label(context) for context in self._running]
        for label in labels:
            losses = {each: found[f'{mode}_loss/{self._place(each, label)}'] for each in self._objectives}
            found[f'{mode}_loss/ctx_{label}'] = self._objectives.weighted(losses)
        one = f'{mode}_accuracy/ctx_{labels[0]}' in found  # the sum of several losses has no accuracy or perplexity
        for name in ('loss', 'accuracy') if one else ('loss',):
            found[f'{mode}_{name}'] = torch.stack([found[f'{mode}_{name}/ctx_{label}'] for label in labels]).mean()
        if one:
            found[f'{mode}_perplexity'] = found[f'{mode}_loss'].exp()
        if found[f'{mode}_loss'].isnan():
            logging.warning(f"{mode}_loss is NaN: there was no loss position, or the model's outputs are not finite")
        return found

    def summary(self, mode: str, dataloader_idx: int = 0) -> dict:
        """Return what NeMo's ``multi_validation_epoch_end`` returns: the loss to monitor, and all that is logged.

        The plain loss and accuracy are the means over the contexts.
        """
        if not self._results:  # not in a trainer's loop
            self.finish(mode)
        found = self._results[dataloader_idx]
        return {f'{mode}_loss': found[f'{mode}_loss'], 'log': dict(found)}
