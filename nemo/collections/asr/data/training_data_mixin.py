# SPDX-License-Identifier: Apache-2.0
"""A model's training data: own options, the place in the epoch, the wait. New in this project."""

# mypy: disable-error-code="misc"

import copy

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf, open_dict
from torch.utils.data import IterableDataset, RandomSampler, SequentialSampler

from nemo.collections.asr.data.loader_workers import end_workers_with_their_parent
from nemo.collections.asr.data.resumable_cuts import ResumableCutLoader, resumable_config
from nemo.collections.asr.data.resumable_loader import ResumableDataLoader, ResumableLoader, make_resumable
from nemo.collections.asr.data.ssl_dataset import parts_of, set_skip_bad_audio
from nemo.collections.asr.parts.att_context.synced_collate import create_synced_context_collate
from nemo.collections.asr.parts.utils.config_keys import SyncedContexts
from nemo.collections.asr.parts.utils.data_wait import NAME, DataWait
from nemo.collections.asr.parts.utils.nonfinite_guard import MAX_SKIPPED_IN_A_ROW, on_this_rank
from nemo.utils import logging
from nemo.utils.left_out import LEFT_OUT


def with_own_options(loader, synced_contexts=None, skip_bad_audio=None, resumable=None, channel_selector=None):
    """Apply a data section's options to its loader; ValueError naming one that it does not support."""
    if skip_bad_audio is not None:
        set_skip_bad_audio(loader.dataset, skip_bad_audio)
    for part in parts_of(loader.dataset if channel_selector is not None else None):
        if hasattr(part, 'featurizer'):  # NeMo's tarred datasets take none
            part.featurizer.channel_selector = channel_selector
    if synced_contexts is not None:
        SyncedContexts.parse(synced_contexts, 'synced_contexts')
        loader.collate_fn = create_synced_context_collate(loader.collate_fn, **synced_contexts)
    return loader if resumable is None else make_resumable(loader, resumable)


class LogLeftOut(pl.Callback):
    """Logs how many utterances this rank has left out so far, for which reasons, and the first of each.

    A batch of which nothing is left adds no gradient; many in a row, or one in validation, end the run.
    """

    _silent_in_a_row = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Note whether something is left of the batch."""
        self._silent_in_a_row = count = self._silent_in_a_row + 1 if getattr(batch, 'is_silence', False) else 0
        if count >= MAX_SKIPPED_IN_A_ROW:
            raise ValueError(f"nothing is left of the last {count} batches{on_this_rank()}; the log names why")

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        """Let silence add no gradient."""
        if self._silent_in_a_row:
            loss.register_hook(torch.zeros_like)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        """Refuse silence."""
        if getattr(batch, 'is_silence', False):
            raise ValueError(f"each utterance of a batch{on_this_rank()} is bad; the log names them")

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        """Log it after each epoch."""
        log = logging.warning if LEFT_OUT.total() else logging.info
        log(f"Data{on_this_rank()}: {LEFT_OUT.summary()}")

    on_train_end = on_train_epoch_end


def warn_of_undivided_data(trainer) -> None:
    """Warn if all ranks read the same utterances of a plain manifest."""
    sampler = getattr(trainer.train_dataloader, 'sampler', None)
    if trainer.world_size > 1 and isinstance(sampler, (RandomSampler, SequentialSampler)):  # not one that divides
        logging.warning("trainer.use_distributed_sampler is false, so all ranks have the same batches; set it to true")


class TrainingDataMixin:
    """Mixin for the SSL models, before NeMo's class: their loaders, and the share of time without a batch."""

    _data_wait = DataWait()  # until training starts
    _waiting_for_data: dict[str, float] = {}  # what a step logs of the wait before it

    def configure_callbacks(self) -> list:
        """Add the log of what is left out."""
        return [*super().configure_callbacks(), LogLeftOut()]

    def _setup_dataloader_from_config(self, config):
        config = copy.deepcopy(config if OmegaConf.is_config(config) else OmegaConf.create(config))
        with open_dict(config):
            own = {key: config.pop(key, None) for key in ('synced_contexts', 'skip_bad_audio', 'resumable')}
            for key in ('augmentor', 'batch_augmentor'):  # NeMo's loaders fail where one is null
                if config.get(key) is None:
                    config.pop(key, None)
        if getattr(self._trainer, 'overfit_batches', 0):  # Lightning repeats batches only of a loader that it knows
            own['resumable'] = None
        options = own.pop('resumable') if config.get('use_lhotse') or config.get('is_tarred') else None
        if options is not None:
            config = resumable_config(config, options, self.world_size)
        loader = super()._setup_dataloader_from_config(config)
        if loader is None:
            return None
        loader = with_own_options(loader, channel_selector=config.get('channel_selector'), **own)
        if options is not None:
            loader = ResumableCutLoader(loader, config, options, self.global_rank, self.world_size)
        end_workers_with_their_parent(loader)
        return loader

    def setup_training_data(self, train_data_config) -> None:
        """Make the training loader; ValueError if the number of batches is not limited."""
        hint = " of an epoch, or set model.train_ds.resumable"
        self._set_up(super().setup_training_data, train_data_config, '_train_dl', 'limit_train_batches', hint)

    def setup_validation_data(self, val_data_config) -> None:
        """Make a validation loader; ValueError if the number of batches is not limited."""
        self._set_up(super().setup_validation_data, val_data_config, '_validation_dl', 'limit_val_batches')

    def _set_up(self, setup, config, name: str, key: str, hint: str = '') -> None:
        try:
            setup(config)
        except TypeError as error:
            if isinstance(getattr(self, name), ResumableLoader):
                return  # the data have no end, and need no limit
            if not isinstance(getattr(getattr(self, name), 'dataset', None), IterableDataset):
                raise
            found = f"trainer.{key} is {getattr(self._trainer, key)}, and these data have no length"
            raise ValueError(f"{found}; set it to the number of batches{hint}") from error

    def on_train_start(self) -> None:
        """Count the batches of a resumed epoch as the data loader does; the ranks may be others than before."""
        super().on_train_start()
        warn_of_undivided_data(self.trainer)
        self._data_wait = DataWait()
        loader = self.trainer.train_dataloader
        if isinstance(loader, ResumableDataLoader):
            progress, place = self.trainer.fit_loop.epoch_loop.batch_progress.current, loader.position
            if progress.completed != place:  # Lightning counts a batch after the callbacks that save
                logging.info(f"Continuing with batch {place} of {len(loader)} of the epoch, on {loader.ranks} ranks.")
                progress.ready = progress.started = progress.processed = progress.completed = place

    def on_train_batch_start(self, batch, batch_idx: int, unused: int = 0):
        """Seed what the step draws, where the data are resumable, and take the time."""
        loader = getattr(self._trainer, 'train_dataloader', None)
        if isinstance(loader, ResumableLoader):
            loader.start_step()
        share = self._data_wait.step_starts()
        self._waiting_for_data = {} if share is None else {NAME: share}
        return super().on_train_batch_start(batch, batch_idx, unused)

    def on_train_batch_end(self, outputs, batch, batch_idx: int, unused: int = 0) -> None:
        """Take the time."""
        super().on_train_batch_end(outputs, batch, batch_idx, unused)
        self._data_wait.step_ends()

    def on_validation_start(self) -> None:
        """Leave validation out of the wait."""
        super().on_validation_start()
        self._data_wait.pause()
