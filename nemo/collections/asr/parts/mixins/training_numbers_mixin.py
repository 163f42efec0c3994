# SPDX-License-Identifier: Apache-2.0
"""Numbers of a logging interval: sums and means over its steps and over all ranks, in one reduction."""

import copy
import sys
import time

import torch
from omegaconf import ListConfig
from torch.utils.flop_counter import FlopCounterMode

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Logs = dict[str, float | torch.Tensor]
OF_ONE_STEP = ('learning_rate', 'global_step', 'att_context_left', 'att_context_right', 'next_token_offset')
SAMPLE_RATE = 16000
CONTEXT_LOSS = 'train_loss/ctx_'
FRAMES = 1024  # feature frames in which the subsampling's operations are counted


class IntervalNumbers:
    """Sums and means over the steps of an interval; they stay on the device until they are reduced."""

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}  # sum and weight [2]
        self.summed: set[str] = set()

    def add(self, sums: Logs | None = None, means: Logs | None = None) -> None:
        """Add what a step counted, and values of which the mean over steps and ranks is wanted."""
        self.summed.update(sums or ())
        for name, value in {**(sums or {}), **(means or {})}.items():
            self.add_mean(name, value, 1.0)

    def add_mean(self, name: str, total, weight) -> None:
        """Add a sum of values, and the weight that it is divided by."""
        total = torch.as_tensor(total, dtype=torch.float32).detach().reshape(1)
        weight = weight.reshape(1) if isinstance(weight, torch.Tensor) else torch.full_like(total, weight)
        pair = torch.cat([total, weight.float()])
        self.totals[name] = self.totals[name] + pair.to(self.totals[name].device) if name in self.totals else pair

    def limit(self, prefix: str, names: set[str]) -> None:
        """Make the means whose names have a prefix the same on all ranks: those of some names and no others."""
        kept = {name: pair for name, pair in self.totals.items() if not name.startswith(prefix) or name in names}
        self.totals = {**{name: torch.zeros(2) for name in names}, **kept}

    def reduce(self, counts: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return sums and means over the interval and all ranks, and begin the next interval.

        Every rank calls it, and has added the same names. A mean of nothing is NaN.

        Args:
            counts: a tensor [N] of the device of the reduction, which is summed over ranks, too; N may be 0.
        """
        names, totals = sorted(self.totals), self.totals
        self.totals = {}
        vector = torch.cat([*(_to(totals[name], counts.device) for name in names), counts.float()])
        if ranks() > 1:
            torch.distributed.all_reduce(vector)
        pairs = dict(zip(names, vector[: 2 * len(names)].view(-1, 2), strict=True))
        values = {name: pair[0] if name in self.summed else pair[0] / pair[1] for name, pair in pairs.items()}
        return values, vector[2 * len(names) :]


class TrainingNumbersMixin:
    """Mixin for the SSL models: logs the numbers of each logging interval (``trainer.log_every_n_steps``).

    docs/scale.md lists them. What a step logs is averaged over the interval's steps and over all ranks. None of it
    synchronises host and device.
    """

    _interval: IntervalNumbers | None = None
    _interval_began = 0.0
    # weights before the last step of an interval, and themselves
    _updated: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
    _subsampling_flops: float | None = None  # of a feature frame; None: of an encoder that is no Conformer

    def configure_model(self) -> None:
        """Count the operations of the subsampling, before its weights may be sharded."""
        if hasattr(self.encoder, 'pre_encode') and hasattr(self.encoder, '_feat_in'):
            subsampling = getattr(self.encoder.pre_encode, 'pre_encode', self.encoder.pre_encode)  # without masking
            self._subsampling_flops = _flops_per_frame(subsampling, self.encoder._feat_in)
        super().configure_model()

    def on_train_start(self) -> None:
        """Begin the first interval."""
        super().on_train_start()
        self._interval, self._interval_began = IntervalNumbers(), time.perf_counter()

    def add_step(self, logs: Logs) -> None:
        """Add what a training step logs to the interval."""
        if self._interval is not None:
            self._interval.add(means={name: value for name, value in logs.items() if name not in OF_ONE_STEP})

    def add_batch(self, batch, record) -> None:
        """Add the sizes of a batch, as the data loader gives it, and of its forward pass to the interval."""
        if self._interval is None:
            return
        found = [objective.frame_losses for objective in self.objectives if objective.frame_losses is not None]
        predicted = sum(of_objective[1].sum() for of_objective in found)
        audio, lengths = (batch.audio, batch.audio_len) if hasattr(batch, 'audio') else (batch[0], batch[1])
        sums = {'samples': lengths.sum(), 'padded_samples': float(audio.numel()), 'predicted': predicted}
        if self._subsampling_flops is not None:
            sums['flops'] = self.flops_of_step(record, predicted)
        self._interval.add(sums)
        names = sorted(_sources_of((self.cfg.get('train_ds') or {}).get('input_cfg')))
        if names and found and getattr(batch, 'sources', None):
            losses, predicted, utterances = found[0]
            index = _to(torch.tensor([names.index(source) for source in batch.sources]), losses.device)[utterances]
            of_sources = [losses.new_zeros(len(names)).index_add(0, index, each.to(losses)) for each in found[0][:2]]
            for name, total, weight in zip(names, *of_sources, strict=True):
                self._interval.add_mean(f'train_loss/source/{name}', total, weight)

    def flops_of_step(self, record, predicted: torch.Tensor):
        """Return the floating point operations of forward and backward pass, without what is computed twice.

        Six for each weight and frame, twelve for each pair of a frame and a key in its window, dimension and layer.
        """
        encoder, (batch, _, frames) = self.encoder, record.encoded.shape
        weights = sum(weight.numel() for weight in encoder.layers.parameters() if weight.dim() > 1)
        left, right = encoder.att_context_size[0], encoder.att_context_size[-1]
        keys = frames if left < 0 else min(frames, left + 1 + max(right, 0))
        attention = 12.0 * len(encoder.layers) * encoder.d_model * frames * keys
        decoder = 6.0 * sum(weight.numel() for weight in self.objectives.decoder.parameters() if weight.dim() > 1)
        subsampling = 3.0 * self._subsampling_flops * record.features[:, 0].numel()
        return batch * (6.0 * weights * frames + attention) + subsampling + decoder * predicted

    def on_before_optimizer_step(self, optimizer) -> None:
        """Keep the weights before the last step of an interval."""
        super().on_before_optimizer_step(optimizer)
        if self._interval is not None and self._interval_ends():
            weights = [weight for group in optimizer.param_groups for weight in group['params']]
            weights = [weight for weight in weights if weight.grad is not None]
            if weights:  # a skipped step may have no gradient at all
                self._updated = [weight.detach().clone() for weight in weights], weights

    def on_validation_start(self) -> None:
        """Leave validation out of the seconds of the interval."""
        super().on_validation_start()
        self._interval_began -= time.perf_counter()

    def on_validation_end(self) -> None:
        """Leave validation out of the seconds of the interval."""
        super().on_validation_end()
        self._interval_began += time.perf_counter()

    def on_train_batch_end(self, outputs, batch, batch_idx: int, unused: int = 0) -> None:
        """Reduce and log the numbers of an interval after its last step."""
        super().on_train_batch_end(outputs, batch, batch_idx, unused)
        if self._interval is not None and self._interval_ends():
            self.log_dict(self._numbers_of_interval())

    def _interval_ends(self) -> bool:
        trainer = self.trainer
        return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()

    def _numbers_of_interval(self) -> dict[str, torch.Tensor]:
        now = time.perf_counter()
        seconds, self._interval_began = now - self._interval_began, now
        peak = peak_memory(self.device)
        sums = {f'memory {rank}': peak * (rank == self.global_rank) for rank in range(ranks())}  # for their maximum
        if self._updated is not None:
            sums.update(_squares(*self._updated))
            self._updated = None
        if self._logs_skipped():
            sums['skipped_utterances'] = self._skipped_utterances
        self._interval.add(sums, {'seconds': seconds})
        policy = getattr(self.encoder, 'att_context_policy', None)
        if policy is not None and not policy.shared:  # the ranks have had different contexts
            self._interval.limit(CONTEXT_LOSS, {CONTEXT_LOSS + policy.label(each) for each in policy.contexts()})
        use = getattr(getattr(self, 'reports', None), 'codebook_use', None)
        if use is None or use.batches == 0:
            return self._derived(self._interval.reduce(torch.zeros(0, device=self.device))[0])
        logs, counts = self._interval.reduce(use.counts.flatten())
        return self._derived(logs) | use.logs(counts.view_as(use.counts))

    def _derived(self, logs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replace the sums in what was reduced by what is computed of them."""
        seconds, world = logs.pop('seconds'), ranks()
        logs['peak_memory_gb'] = torch.stack([logs.pop(f'memory {rank}') for rank in range(world)]).max() / 1e9
        if 'weights' in logs:
            logs['update_to_weight_ratio'] = (logs.pop('updates') / logs.pop('weights').clamp(min=1e-30)).sqrt()
        if 'samples' in logs:
            samples = logs.pop('samples')
            logs['padding_share'] = 1 - samples / logs.pop('padded_samples')
            logs['audio_seconds_per_second'] = samples / self.cfg.get('sample_rate', SAMPLE_RATE) / seconds
            logs['audio_seconds_per_second/rank'] = logs['audio_seconds_per_second'] / world
            logs['predicted_tokens_per_second'] = logs.pop('predicted') / seconds
        if 'flops' in logs:
            flops = logs.pop('flops') / seconds
            logs['model_tflops_per_second'] = flops / 1e12
            if self.cfg.get('log_peak_flops'):
                logs['model_flops_share'] = flops / world / float(self.cfg.log_peak_flops)
        return logs


def ranks() -> int:
    """Return how many ranks train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _sources_of(input_cfg) -> set[str]:
    """Return the tags ``source`` of a mixture and of its groups."""
    if not isinstance(input_cfg, (list, ListConfig)):
        return set()
    own = {item.tags.source for item in input_cfg if 'source' in (item.get('tags') or {})}
    return own.union(*(_sources_of(item.get('input_cfg')) for item in input_cfg))


def peak_memory(device: torch.device) -> float:
    """Return the largest number of bytes so far: of tensors on a GPU, else of this process; NaN on Windows."""
    if device.type == 'cuda':
        return float(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return float('nan')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == 'darwin' else 1024.0)


def _squares(before: list[torch.Tensor], after: list[torch.Tensor]) -> Logs:
    """Return the sums of squares of weights and of their updates; of sharded weights, those of this rank's shards."""
    old, new = ([getattr(w.detach(), 'to_local', lambda w=w: w.detach())() for w in each] for each in (before, after))
    norms = {'weights': torch._foreach_norm(old), 'updates': torch._foreach_norm(torch._foreach_sub(new, old))}
    return {name: torch.stack(each).square().sum() for name, each in norms.items()}


def _flops_per_frame(subsampling: torch.nn.Module, features: int) -> float:
    """Return the operations of a forward pass of the subsampling, per feature frame; on torch's meta device."""
    copied, lengths = copy.deepcopy(subsampling).to('meta', torch.float32), torch.full((1,), FRAMES, device='meta')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copied(x=torch.empty(1, FRAMES, features, dtype=torch.float32, device='meta'), lengths=lengths)
    return counter.get_total_flops() / FRAMES


def _to(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device without waiting for it."""
    if device.type != 'cuda' or value.device == device:
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)
