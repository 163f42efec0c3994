# SPDX-License-Identifier: Apache-2.0
"""Validation in each attention context, on the same features, targets and masks.

Shapes: B batch, N samples, D features, M mask frames.
"""

import random
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, context_label
from nemo.collections.asr.parts.att_context.visible_frames import window_of_masking
from nemo.collections.asr.parts.att_context.windows import Window, tightest_window, tightest_window_of
from nemo.collections.asr.parts.objectives.base import BatchRecord, FrameScores
from nemo.collections.asr.parts.ssl_reports.audit import audit_pass
from nemo.collections.asr.parts.utils.config_keys import ValidationMasks
from nemo.utils import logging

CHOICES = ('all', 'first')


def parse_contexts(value, encoder, field: str = 'model.validate_contexts') -> list:
    """Return the contexts to run: ``all`` of an encoder's config, the ``first``, or those of a list.

    Raises:
        ValueError: naming the field and the item, if it is no context, comes twice, or the encoder does not support it.
    """
    if not hasattr(encoder, 'using_att_context_size'):
        raise ValueError(f"{field} is {value!r}, but {type(encoder).__name__} has no attention contexts")
    known = [list(context) for context in encoder.att_context_size_all]
    if value in CHOICES:
        return known if value == 'all' else known[:1]
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{field} is {value!r}; it must be one of {CHOICES}, or a list of contexts")
    contexts = []
    for index, item in enumerate(value):
        where = f'{field}[{index}]'
        context = encoder.parse_att_context_size(item, where)
        try:
            encoder.check_att_context_size(context)
        except ValueError as error:
            raise ValueError(f"{where}: the encoder does not support {list(context)}: {error}") from error
        contexts.append(list(context))
    if not contexts or any(contexts.count(context) > 1 for context in contexts):
        raise ValueError(f"{field} is {contexts}; it needs contexts, each once")
    return contexts


def utterance_seeds(signal: torch.Tensor, lengths: torch.Tensor, seed: int) -> list[int]:
    """Return a 32-bit seed for each utterance from its samples or features [B, ..., N] and length [B].

    Neither padding, nor the batch around it, nor the rank changes it. Synchronises host and device.
    """
    rows = zip(signal.float().cpu(), lengths.tolist(), strict=True)
    return [zlib.crc32(row[..., :length].numpy().tobytes(), seed) for row, length in rows]


class FixedMasks:
    """A masking that hides the same in every call, to be passed where a masking module is called.

    The first call masks each utterance by itself, cut to its length, after seeding Python's, NumPy's and torch's
    generators, which are afterwards as they were. Later calls, for the same features, return the same again. A masking
    that takes a context gets the window.
    """

    def __init__(self, masking: torch.nn.Module, seeds: Sequence[int], window: Window):
        self._masking, self._seeds = masking, seeds
        self._arguments = window_of_masking(masking, window)
        self._drawn: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, input_feats: torch.Tensor, input_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masked features and the masks, [B, D, M] each."""
        if self._drawn is not None:
            return self._drawn
        self._drawn = masked, masks = input_feats.clone(), torch.zeros_like(input_feats)
        with isolate_rng():
            for row, (seed, length) in enumerate(zip(self._seeds, input_lengths.tolist(), strict=True)):
                length = min(max(int(length), 1), input_feats.shape[-1])
                for seed_generator in (random.seed, np.random.seed, torch.manual_seed):
                    seed_generator(seed)
                one = input_feats[row : row + 1, :, :length], input_lengths[row : row + 1]
                found = self._masking(input_feats=one[0], input_lengths=one[1], **self._arguments)
                (masked[row, :, :length],), (masks[row, :, :length],) = found
        return self._drawn


def tightest_of(encoder, contexts: Sequence) -> Window:
    """Return a window within what every layer sees in each of several batches' contexts."""
    windows = []
    for context in contexts:
        with encoder.using_att_context_size(context):
            windows.append(tightest_window_of(encoder) or Window(AttContext(UNLIMITED, 0)))
    return tightest_window(windows)


def passes_in_contexts(
    model, batch, contexts: Sequence, seed: int, window: Window | None = None, masked=True, inputs=None
) -> Iterator[tuple[list, BatchRecord]]:
    """Encode a batch in each context, active for the caller, on the same features, targets and masks.

    The masks are a function of the seed, each utterance's audio, the masking's configuration and the window: that of all
    layers in all contexts, unless one is given. ``inputs`` are the features of the batch, if they are known.
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
    """Runs validation and test batches in ``model.validate_contexts``, and sums up over batches and ranks."""

    def __init__(self, model):
        masks = ValidationMasks.parse(model.cfg.get('validation_masks'))
        self._wanted, self._seed, left = model.cfg.validate_contexts, masks.seed, masks.left_context
        self._window = None if left is None else Window(AttContext(left, 0))
        if model.forward_is_overridden:
            raise ValueError(f"model.validate_contexts cannot run {type(model).__name__}, which has its own forward")
        if not hasattr(model.loss, 'of_frames') or getattr(model.quantizer, 'num_classes', None) is None:
            raise ValueError(
                "model.validate_contexts needs a loss with of_frames and a quantizer with num_classes; the loss is "
                f"{type(model.loss).__name__}, the quantizer {type(model.quantizer).__name__}"
            )
        self.contexts = parse_contexts(self._wanted, model.encoder)  # of the next validation
        names = {each: model.objectives.name_of(each) for each in model.objectives}
        self._suffixes = {each: f'/{name}' if name else '' for each, name in names.items()}  # in metric names
        # By loader and name: the sum of values times their weights, and of the weights, [2].
        self._sums: dict[tuple[int, str], torch.Tensor] = {}
        self._results: dict[int, dict[str, torch.Tensor]] = {}

    def step(self, model, batch, batch_idx: int, dataloader_idx: int) -> torch.Tensor:
        """Run a data loader's batch in every context, and draw it; return its mean loss over the contexts."""
        if batch_idx == dataloader_idx == 0:
            self._sums, self.contexts = {}, self._contexts_of(model)
        losses, objectives = [], model.objectives
        passes = passes_in_contexts(model, batch, self.contexts, self._seed, self._window, objectives.masks)
        for context, record in passes:
            label, means = f'ctx_{context_label(context)}', {}
            for objective, scores in objectives.scores(record).items():
                whole = FrameScores(*map(torch.cat, zip(*scores.values())))
                places = {f'{label}{self._suffixes[objective]}': whole}
                places.update({f'{label}/{part}': scores[part] for part in objective.parts})
                for place, (likelihood, correct, *_) in places.items():
                    self._add(dataloader_idx, f'loss/{place}', likelihood.sum(dtype=torch.float64), len(correct))
                    self._add(dataloader_idx, f'accuracy/{place}', correct.sum(dtype=torch.float64), len(correct))
                means[objective] = whole.negative_log_likelihood.sum() / max(len(whole.correct), 1)
            losses.append(objectives.weighted(means))
            if objectives.masks:
                audit = audit_pass(record, model.encoder)
                self._add(dataloader_idx, 'masked_share', audit.mask_frames_masked, audit.mask_frames)
                if 'window' in audit.no_visible_frame:
                    name, lost = f'masking/no_visible_frame_in_window/{label}', audit.no_visible_frame['window']
                    self._add(dataloader_idx, name, lost, audit.frames_masked)
            model.reports.draw(model, record)
        return torch.stack(losses).mean()

    def finish(self, model, mode: str) -> None:
        """Add up over the ranks, which must all call this, whether they had batches or not, in one exchange."""
        self.contexts = self._contexts_of(model)
        sums = dict(zip(self._sums, torch.stack([*self._sums.values()]).cpu())) if self._sums else {}
        of_ranks = [sums]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            of_ranks = [{}] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(of_ranks, sums)
        means: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for loader, name in dict.fromkeys(key for each in of_ranks for key in each):
            total, weight = sum(each[loader, name] for each in of_ranks if (loader, name) in each)
            means[loader][name] = (total / weight).float()
        self._sums, self._results = {}, {loader: self._result(model, found, mode) for loader, found in means.items()}

    def _result(self, model, found: dict[str, torch.Tensor], mode: str) -> dict[str, torch.Tensor]:
        """Return the metrics of a loader, of its means over batches and ranks."""
        losses = [name for name in found if name.startswith('loss/')]
        found.update({name.replace('loss', 'perplexity', 1): found[name].exp() for name in losses})
        labels = [f'ctx_{context_label(context)}' for context in self.contexts]
        for label in labels:
            means = {objective: found[f'loss/{label}{suffix}'] for objective, suffix in self._suffixes.items()}
            found[f'loss/{label}'] = model.objectives.weighted(means)
        one = f'accuracy/{labels[0]}' in found  # the sum of several losses has no accuracy or perplexity
        for name in ('loss', 'accuracy') if one else ('loss',):
            found[name] = torch.stack([found[f'{name}/{label}'] for label in labels]).mean()
        if one:
            found['perplexity'] = found['loss'].exp()
        if found['loss'].isnan():
            logging.warning(f"{mode}_loss is NaN: there was no loss position, or the model's outputs are not finite")
        return {f'{mode}_{name}': value for name, value in found.items()}

    def summary(self, mode: str, dataloader_idx: int = 0) -> dict:
        """Return NeMo's ``multi_validation_epoch_end`` results; loss and accuracy are means over contexts."""
        found = self._results.get(dataloader_idx)  # none of a loader without batches
        return {f'{mode}_loss': found[f'{mode}_loss'], 'log': dict(found)} if found else {}

    def _contexts_of(self, model) -> list:
        override = model.att_context_override
        return parse_contexts(self._wanted, model.encoder) if override is None else [list(override)]

    def _add(self, loader: int, name: str, total: torch.Tensor, weight) -> None:
        """Add to a mean the sum of values times their weights, and of the weights: tensors or numbers."""
        if (loader, name) not in self._sums:
            self._sums[loader, name] = torch.zeros(2, dtype=torch.float64, device=total.device)
        self._sums[loader, name][0] += total
        self._sums[loader, name][1] += weight
