# SPDX-License-Identifier: Apache-2.0
"""Numbers of a logging interval: sums and means over its steps and over all ranks, in one reduction."""

import os
import sys
import time
from functools import cached_property

import torch
from lightning.pytorch import LightningModule
from omegaconf import ListConfig, OmegaConf
from torch.distributed.tensor import DTensor

from nemo.collections.asr.parts.utils.nonfinite_guard import parameters_of

Logs = dict[str, float | torch.Tensor]
OF_ONE_STEP = ('learning_rate', 'global_step', 'att_context_left', 'att_context_right', 'next_token_offset')
CONTEXT_LOSS = 'train_loss/ctx_'


class IntervalNumbers:
    """Sums of numbers or tensors over the steps of an interval, kept on the device until reduced."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, bool], torch.Tensor] = {}  # True: of weights, which a mean's sum is divided by

    def add(self, name: str, total, weight=None) -> None:
        """Add to a sum; or, with a weight, to a mean: the sum of some values, and what it is divided by."""
        for key, given in (((name, False), total), ((name, True), weight)):
            if given is not None:
                value, kept = torch.as_tensor(given, dtype=torch.float32).detach(), self._sums.get(key)
                self._sums[key] = value if kept is None else kept + value.to(kept.device)

    def limit(self, prefix: str, names: set[str]) -> None:
        """Make the means whose names have a prefix the same on all ranks: those of some names and no others."""
        for key in [each for each in self._sums if each[0].startswith(prefix) and each[0] not in names]:
            del self._sums[key]
        for name in names:
            self.add(name, 0.0, 0.0)

    def reduce(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return sums and means over the interval and all ranks, on a device, and begin the next interval.

        Every rank calls it, and has added the same names. A mean of nothing is NaN.
        """
        keys = sorted(self._sums)
        parts = [self._sums.pop(key) for key in keys]
        vector = torch.cat([_to(part.flatten(), device) for part in parts])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(vector)
        pieces = vector.split([part.numel() for part in parts])
        sums = {key: piece.view(part.shape) for key, piece, part in zip(keys, pieces, parts)}
        return {name: total / sums.get((name, True), 1) for (name, is_weight), total in sums.items() if not is_weight}


class TrainingNumbersMixin(LightningModule):
    """Mixin for the SSL models: logs the numbers of each logging interval (``trainer.log_every_n_steps``).

    docs/scale.md lists them. What a step logs is averaged over the interval's steps and over all ranks. None of it
    synchronises host and device.
    """

    _interval: IntervalNumbers | None = None
    _step_began = 0.0
    _sources: tuple[str, ...] = ()  # of the training data's mixture
    _updated: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
    """Weights before the last step of an interval, and the weights themselves."""

    def on_train_start(self) -> None:
        """Begin the first interval."""
        super().on_train_start()
        self._sources = tuple(sorted(_sources_of((self.cfg.get('train_ds') or {}).get('input_cfg'))))
        self._interval, self._step_began = IntervalNumbers(), time.perf_counter()

    def add_step(self, logs: Logs) -> None:
        """Add what a training step logs to the interval."""
        if self._interval is not None:
            for name in logs.keys() - set(OF_ONE_STEP):
                self._interval.add(name, logs[name], 1.0)

    def add_batch(self, batch, record) -> None:
        """Add the sizes of a batch, as the data loader gives it, and of its forward pass to the interval."""
        if (numbers := self._interval) is None:
            return
        found = [objective.frame_losses for objective in self.objectives if objective.frame_losses is not None]
        predicted = sum(of_objective[1].sum() for of_objective in found)
        audio, lengths = (batch.audio, batch.audio_len) if hasattr(batch, 'audio') else (batch[0], batch[1])
        numbers.add('samples', lengths.sum())
        numbers.add('padded_samples', audio.numel())
        numbers.add('predicted', predicted)
        if self._encoder_has_context():
            numbers.add('flops', self.flops_of_step(record, predicted))
        names = self._sources
        if names and found and set(getattr(batch, 'sources', None) or ['']) <= {*names}:
            losses, counts, utterances = found[0]
            index = _to(torch.tensor([names.index(source) for source in batch.sources]), losses.device)[utterances]
            empty = losses.new_zeros(len(names))
            numbers.add('sources', *(empty.index_add(0, index, each.to(losses)) for each in (losses, counts)))

    @cached_property
    def _multiplied_weights(self) -> list[int]:
        """How many weights each encoder frame, and each predicted token, is multiplied by."""
        modules = self.encoder, self.objectives.decoder
        return [sum(weight.numel() for weight in module.parameters() if weight.dim() > 1) for module in modules]

    def flops_of_step(self, record, predicted: torch.Tensor):
        """Return the floating point operations of forward and backward pass, without what is computed twice.

        Six for each weight and frame, twelve for each pair of a frame and a key in its window, dimension and layer.
        """
        encoder, (batch, _, frames) = self.encoder, record.encoded.shape
        left, right = encoder.att_context_size[0], encoder.att_context_size[-1]  # of rc, the 3 numbers' ends
        keys = frames if left < 0 else min(frames, left + 1 + max(right, 0))
        of_encoder, of_decoder = self._multiplied_weights
        attention = 12.0 * len(encoder.layers) * encoder.d_model * batch * frames * keys
        return attention + 6.0 * (of_encoder * batch * frames + of_decoder * predicted)

    def on_before_optimizer_step(self, optimizer) -> None:
        """Keep the weights before the last step of an interval."""
        super().on_before_optimizer_step(optimizer)
        if self._interval is not None and self._interval_ends():
            trained = [weight.detach() for weight in parameters_of(optimizer) if weight.grad is not None]
            weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained]
            if weights:  # a skipped step may have no gradient at all
                self._updated = [weight.clone() for weight in weights], weights

    def on_validation_end(self) -> None:
        """Leave validation out of the seconds of the interval."""
        super().on_validation_end()
        self._step_began = time.perf_counter()

    def on_train_batch_end(self, outputs, batch, batch_idx: int, unused: int = 0) -> None:
        """Reduce and log the numbers of an interval after its last step."""
        super().on_train_batch_end(outputs, batch, batch_idx, unused)
        if self._interval is not None:
            now = time.perf_counter()
            self._interval.add('seconds', now - self._step_began)
            self._step_began = now
            if self._interval_ends():
                self._add_whole_interval(self._interval)
                self.log_dict(self._derived(self._interval.reduce(self.device)))

    def _interval_ends(self) -> bool:
        trainer = self.trainer
        return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()

    def _add_whole_interval(self, numbers: IntervalNumbers) -> None:
        own = torch.arange(self.trainer.world_size) == self.global_rank
        numbers.add('peaks', own * peak_memory(self.device))  # of all ranks, for their maximum
        if self._updated is not None:
            before, after = self._updated
            for name, tensors in (('weights', before), ('updates', torch._foreach_sub(after, before))):
                numbers.add(name, torch.stack(torch._foreach_norm(tensors)).square().sum())
            self._updated = None
        if self._logs_skipped():
            numbers.add('skipped_utterances', self._skipped_utterances)
        policy = getattr(self.encoder, 'att_context_policy', None)
        if policy is not None and not policy.shared:  # the ranks have had different contexts
            numbers.limit(CONTEXT_LOSS, {CONTEXT_LOSS + policy.label(each) for each in policy.contexts()})

    def _derived(self, logs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replace the sums in what was reduced by what is computed of them."""
        world, seconds = self.trainer.world_size, logs.pop('seconds')  # of all ranks together
        logs['peak_memory_gb'] = logs.pop('peaks').max() / 1e9
        if 'weights' in logs:
            logs['update_to_weight_ratio'] = (logs.pop('updates') / logs.pop('weights').clamp(min=1e-30)).sqrt()
        if 'samples' in logs:
            samples = logs.pop('samples')
            logs['padding_share'] = 1 - samples / logs.pop('padded_samples')
            per_rank = samples / self.cfg.get('sample_rate', 16000) / seconds
            logs.update({'audio_seconds_per_second': per_rank * world, 'audio_seconds_per_second/rank': per_rank})
            logs['predicted_tokens_per_second'] = logs.pop('predicted') / seconds * world
        if 'sources' in logs:
            logs.update(zip((f'train_loss/source/{name}' for name in self._sources), logs.pop('sources')))
        if 'flops' in logs:
            per_rank = logs.pop('flops') / seconds
            logs['model_tflops_per_second'] = per_rank * world / 1e12
            if peak := self.cfg.get('log_peak_flops'):
                logs['model_flops_share'] = per_rank / peak
        return logs


def _sources_of(input_cfg) -> set[str]:
    """Return the tags ``source`` of a mixture and of its groups."""
    if not isinstance(input_cfg, (list, ListConfig)):
        return set() if input_cfg is None else _sources_of(OmegaConf.load(os.path.expanduser(input_cfg)))
    own = {item.tags.source for item in input_cfg if 'source' in (item.get('tags') or {})}
    return own.union(*(_sources_of(item.get('input_cfg')) for item in input_cfg))


def peak_memory(device: torch.device) -> float:
    """Return the largest memory so far in bytes: of the GPU's tensors, or this process; NaN on Windows."""
    if device.type == 'cuda':
        return float(torch.cuda.max_memory_allocated(device))
    if os.name != 'posix':
        return float('nan')
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == 'darwin' else 1024.0)


def _to(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device without synchronisation."""
    if device.type != 'cuda' or value.device == device:
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)
