# SPDX-License-Identifier: Apache-2.0
"""Validation in each attention context, on the same features, targets and masks."""

from collections.abc import Callable, Iterator, Sequence

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, context_label
from nemo.collections.asr.parts.att_context.windows import Window, tightest_window, tightest_window_of
from nemo.collections.asr.parts.objectives.base import BatchRecord, FrameScores
from nemo.collections.asr.parts.ssl_reports.audit import STACK, audit_masks, windows_of
from nemo.collections.asr.parts.ssl_reports.fixed_masks import FixedMasks, utterance_seeds
from nemo.collections.asr.parts.utils.config_keys import ValidationMasks
from nemo.utils import logging

CHOICES = ('all', 'first')


def parse_contexts(value, encoder, field: str = 'model.validate_contexts') -> list:
    """Return the contexts to run: ``all`` of an encoder's config, the ``first`` of them, or those of a list.

    Raises:
        ValueError: naming the field and the item, if it is no context, comes twice, or the encoder cannot follow it.
    """
    if not hasattr(encoder, 'using_att_context_size'):
        raise ValueError(f"{field} is {value!r}, but {type(encoder).__name__} has no attention contexts")
    known = [list(context) for context in encoder.att_context_size_all]
    if value in CHOICES:
        return known if value == 'all' else known[:1]
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{field} is {value!r}; it must be one of {CHOICES}, or a list of contexts")
    contexts = [_checked(item, encoder, f'{field}[{index}]') for index, item in enumerate(value)]
    if not contexts or any(contexts.count(context) > 1 for context in contexts):
        raise ValueError(f"{field} is {contexts}; it needs contexts, each once")
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
    model, batch, contexts: Sequence, seed: int, window: Window | None = None, masked=True, inputs=None
) -> Iterator[tuple[list, BatchRecord]]:
    """Encode a batch in each context, on the same features, targets and masks; the caller is within the context.

    The masks are a function of the seed, each utterance's audio, the masking's configuration and the window: that of all
    layers in all contexts, unless one is given. ``inputs`` are the features of the batch, where they are there already.
    """
    masking = None
    if masked:
        window = tightest_of(model.encoder, contexts) if window is None else window
        clean = (batch.audio, batch.audio_len) if hasattr(batch, 'audio') else (batch[0], batch[1])
        masking = FixedMasks(model.mask_processor, utterance_seeds(*clean, seed), window)
    inputs = model.inputs_of(batch) if inputs is None else inputs  # after the seeds: dither changes the audio in place
    for context in contexts:
        with model.encoder.using_att_context_size(context):
            yield context, model.encode(inputs, masking)


class ContextValidation:
    """Runs validation and test batches in several contexts, and sums up over batches and ranks.

    Takes a model, ``model.validate_contexts`` and ``model.validation_masks``.

    Raises:
        ValueError: naming the config key, its value and what is allowed.
    """

    def __init__(self, model, contexts='all', masks=None):
        masks = ValidationMasks.parse(masks)
        self._wanted, self.seed = contexts, masks.seed
        self.window = None if masks.left_context is None else Window(AttContext(masks.left_context, 0))
        if not hasattr(model.loss, 'of_frames') or getattr(model.quantizer, 'num_classes', None) is None:
            raise ValueError(
                "model.validate_contexts needs a loss with of_frames and a quantizer with num_classes; the loss is "
                f"{type(model.loss).__name__}, the quantizer {type(model.quantizer).__name__}"
            )
        self.contexts = parse_contexts(contexts, model.encoder)  # of the next validation
        self._sums: torch.Tensor | None = None  # [loaders, means, 2]: the values times their weights, and the weights
        self._of_loaders: list[dict[str, torch.Tensor]] = []  # views of these sums [2] by name
        self._results: list[dict[str, torch.Tensor]] = []

    def start(self, model, loaders: int) -> None:
        """Forget all sums; every rank makes ready for every data loader, whatever batches it will have."""
        override, objectives = model.att_context_override, model.objectives
        self.contexts = parse_contexts(self._wanted, model.encoder) if override is None else [list(override)]
        self._objectives, names = objectives, ['masked_share'] if objectives.masks else []
        for context in self.contexts:
            label = context_label(context)
            if objectives.masks and windows_of(model.encoder):
                names.append(f'masking/no_visible_frame_in_window/ctx_{label}')
            places = [place for each in objectives for place in self._places(each, label)]
            names += [f'{name}/{place}' for place in places for name in ('loss', 'accuracy')]
        self._sums = torch.zeros(loaders, len(names), 2, dtype=torch.float64, device=model.device)
        self._of_loaders = [dict(zip(names, sums.unbind())) for sums in self._sums]
        self._results = []

    def _places(self, objective, label: str) -> list[str]:
        """Return what an objective's figures in a context are filed under: the whole, and each part."""
        name = self._objectives.name_of(objective)
        return [
            f'ctx_{label}/{name}' if name else f'ctx_{label}',
            *(f'ctx_{label}/{part}' for part in objective.parts),
        ]

    def step(
        self, model, batch, dataloader_idx: int, after_each: Callable = lambda model, record: None
    ) -> torch.Tensor:
        """Run a batch of a data loader in every context; return its loss, the mean over the contexts.

        ``after_each`` is called with the model and the record of each forward pass, within its context.
        """
        if self._sums is None or dataloader_idx >= len(self._sums):  # a step outside of a trainer's loop
            self.start(model, dataloader_idx + 1)
        losses: list[torch.Tensor] = []
        masks, sums = model.objectives.masks, self._of_loaders[dataloader_idx]
        for context, record in passes_in_contexts(model, batch, self.contexts, self.seed, self.window, masks):
            label, of_objectives = context_label(context), {}
            for objective, scores in model.objectives.scores(record).items():
                of_objectives[objective] = self._add_scores(sums, objective, label, scores)
            if masks:
                windows = {name: each for name, each in windows_of(model.encoder).items() if name != STACK}
                self._add_masks(sums, record, windows, label, first=not losses)
            losses.append(model.objectives.weighted(of_objectives))
            after_each(model, record)
        return torch.stack(losses).mean()

    def _add_scores(self, sums, objective, label: str, scores: dict[str, FrameScores]) -> torch.Tensor:
        """Add the scores of an objective in a context; return its loss, 0 where there are no frames."""
        lost, frames = 0, 0
        whole, *_ = self._places(objective, label)
        for part, score in scores.items():
            count, likelihood = len(score.utterances), score.negative_log_likelihood.sum(dtype=torch.float64)
            for place in [whole, f'ctx_{label}/{part}'] if part in objective.parts else [whole]:
                _add(sums[f'loss/{place}'], likelihood, count)
                _add(sums[f'accuracy/{place}'], score.correct.sum(dtype=torch.float64), count)
            lost, frames = lost + likelihood, frames + count
        return lost.float() / max(frames, 1)

    def _add_masks(self, sums, record: BatchRecord, windows: dict[str, Window], label: str, first: bool) -> None:
        audit = audit_masks(record.masks, record.mask_lengths, record.factor, windows, record.threshold)
        if first:  # the masks are the same in every context
            _add(sums['masked_share'], audit.mask_frames_masked, audit.mask_frames)
        if windows:
            no_visible = torch.stack([*audit.no_visible_frame.values()]).max()
            _add(sums[f'masking/no_visible_frame_in_window/ctx_{label}'], no_visible, audit.frames_masked)

    def finish(self, mode: str) -> None:
        """Add up over the ranks, which must all call this, whether they had batches or not, in one reduction."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        self._results = [self._result(sums, mode) for sums in self._of_loaders]

    def _result(self, sums: dict[str, torch.Tensor], mode: str) -> dict[str, torch.Tensor]:
        found = {name: (total / weight).float() for name, (total, weight) in sums.items()}
        places = [name.removeprefix('loss/') for name in found if name.startswith('loss/')]
        found.update({f'perplexity/{place}': found[f'loss/{place}'].exp() for place in places})
        labels = [context_label(context) for context in self.contexts]
        for label in labels:
            losses = {each: found[f'loss/{self._places(each, label)[0]}'] for each in self._objectives}
            found[f'loss/ctx_{label}'] = self._objectives.weighted(losses)
        one = f'accuracy/ctx_{labels[0]}' in found  # the sum of several losses has no accuracy or perplexity
        for name in ('loss', 'accuracy') if one else ('loss',):
            found[name] = torch.stack([found[f'{name}/ctx_{label}'] for label in labels]).mean()
        if one:
            found['perplexity'] = found['loss'].exp()
        if found['loss'].isnan():
            logging.warning(f"{mode}_loss is NaN: there was no loss position, or the model's outputs are not finite")
        return {f'{mode}_{name}': value for name, value in found.items()}

    def summary(self, mode: str, dataloader_idx: int = 0) -> dict:
        """Return what NeMo's ``multi_validation_epoch_end`` returns: the loss to monitor, and all that is logged.

        The plain loss and accuracy are the means over the contexts.
        """
        if not self._results:  # not in a trainer's loop
            self.finish(mode)
        found = self._results[dataloader_idx]
        return {f'{mode}_loss': found[f'{mode}_loss'], 'log': dict(found)}


def _add(mean: torch.Tensor, total, weight) -> None:
    """Add to a mean [2] the sum of values times their weights, and of the weights: tensors or numbers."""
    mean[0] += total
    mean[1] += weight
