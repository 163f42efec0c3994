# SPDX-License-Identifier: Apache-2.0
"""What a model does about its training data: own options, the place in the epoch, and the wait. New in this project."""

import copy
from contextlib import nullcontext

import lightning.pytorch as pl
from omegaconf import OmegaConf, open_dict
from torch.utils.data import IterableDataset, RandomSampler, SequentialSampler

from nemo.collections.asr.data.loader_options import take_own_options, with_own_options
from nemo.collections.asr.data.loader_workers import end_workers_with_their_parent
from nemo.collections.asr.data.resumable_cuts import make_resumable_cuts, reads_cuts, resumable_config
from nemo.collections.asr.data.resumable_loader import ResumableDataLoader, ResumableLoader
from nemo.collections.asr.data.ssl_dataset import parts_of
from nemo.collections.asr.parts.utils.data_wait import NAME, DataWait
from nemo.collections.asr.parts.utils.nonfinite_guard import on_this_rank
from nemo.utils import logging
from nemo.utils.left_out import LEFT_OUT


def without_null(config):
    """Return a data section without augmentors that are null, on which NeMo's loaders fail."""
    null = [
        key for key in ('augmentor', 'batch_augmentor') if config is not None and key in config and config[key] is None
    ]
    if not null:
        return config
    config = copy.deepcopy(config)
    with open_dict(config) if OmegaConf.is_config(config) else nullcontext():
        for key in null:
            del config[key]
    return config


def log_left_out() -> None:
    """Log how many utterances this rank has left out, for which reasons, and the first of each."""
    log = logging.warning if LEFT_OUT.total() else logging.info
    log(f"Data{on_this_rank()}: {LEFT_OUT.summary()}")


class LogLeftOut(pl.Callback):
    """Logs what was left out, for models without :class:`TrainingDataMixin`."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        """Log what was left out so far."""
        log_left_out()

    def on_train_end(self, trainer, pl_module) -> None:
        """Log what was left out."""
        log_left_out()


def warn_of_undivided_data(trainer) -> None:
    """Warn if all ranks read the same utterances of a plain manifest."""
    sampler = getattr(trainer.train_dataloader, 'sampler', None)
    if trainer.world_size > 1 and isinstance(sampler, (RandomSampler, SequentialSampler)):  # not one that divides
        logging.warning(
            "trainer.use_distributed_sampler is false, so all ranks train on the same batches of the manifest; set it to true"
        )


class TrainingDataMixin:
    """Mixin for the SSL models, before NeMo's class.

    Logs ``data_wait_share``: of the time from one step to the next, the share in which there was no batch.
    """

    _data_wait: DataWait | None = None
    _share_waited: float | None = None

    def _setup_dataloader_from_config(self, config):
        loader = self._make_loader(config)
        end_workers_with_their_parent(loader)
        return loader

    def setup_training_data(self, train_data_config) -> None:
        """Make the training loader, as NeMo does.

        Raises:
            ValueError: if the number of batches is not known and ``trainer.limit_train_batches`` does not give it.
        """
        try:
            super().setup_training_data(train_data_config)
        except TypeError as error:
            if isinstance(self._train_dl, ResumableLoader):
                return  # the data have no end, and need no limit
            if not isinstance(getattr(self._train_dl, 'dataset', None), IterableDataset):
                raise
            raise ValueError(
                f"trainer.limit_train_batches is {self._trainer.limit_train_batches}, and these data have no length; set it "
                "to the number of batches of an epoch, or set model.train_ds.resumable"
            ) from error

    def _make_loader(self, config):
        loader = self._make_loader_with_options(without_null(config))
        selector = None if config is None else config.get('channel_selector')
        for part in parts_of(getattr(loader, 'dataset', None)):
            if selector is not None and hasattr(part, 'featurizer'):  # NeMo's tarred datasets take no selector
                part.featurizer.channel_selector = selector
        return loader

    def _make_loader_with_options(self, config):
        config, own = take_own_options(config)
        if own.get('resumable') is None or not reads_cuts(config):
            return with_own_options(super()._setup_dataloader_from_config(config), **own)
        options = own.pop('resumable')
        config = resumable_config(config, options, self.world_size)
        loader = super()._setup_dataloader_from_config(config)
        if loader is not None:
            loader = make_resumable_cuts(loader, config, options, self.global_rank, self.world_size)
        return with_own_options(loader, **own)

    def on_train_start(self):
        """Count the batches of a resumed epoch as the data loader does; the ranks may be others than before."""
        super().on_train_start()
        warn_of_undivided_data(self.trainer)
        self._data_wait = DataWait()
        loader = self._resumable_loader()
        if not isinstance(loader, ResumableDataLoader):
            return
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        place = loader.next_batch
        if progress.completed != place and progress.completed:
            logging.info(f"Going on with batch {place} of {len(loader)} of the epoch, on {loader.ranks} ranks.")
            progress.ready = progress.started = progress.processed = progress.completed = place

    def on_train_batch_start(self, batch, batch_idx: int, unused: int = 0):
        """Seed what the step draws, where the data are resumable, and look at the clock."""
        loader = self._resumable_loader()
        if loader is not None:
            loader.start_step()
        if self._data_wait is not None:
            self._share_waited = self._data_wait.step_starts()
        return super().on_train_batch_start(batch, batch_idx, unused)

    def on_train_batch_end(self, outputs, batch, batch_idx: int, unused: int = 0) -> None:
        """Look at the clock once more."""
        super().on_train_batch_end(outputs, batch, batch_idx, unused)
        if self._data_wait is not None:
            self._data_wait.step_ends()

    def on_validation_start(self) -> None:
        """Leave validation out of the wait."""
        super().on_validation_start()
        if self._data_wait is not None:
            self._data_wait.pause()

    def on_train_epoch_end(self) -> None:
        """Log what was left out so far."""
        super().on_train_epoch_end()
        log_left_out()

    def on_train_end(self) -> None:
        """Log what was left out."""
        super().on_train_end()
        log_left_out()

    def _waiting_for_data(self) -> dict[str, float]:
        """Return what a step logs of the wait before it."""
        return {} if self._share_waited is None else {NAME: self._share_waited}

    def _resumable_loader(self) -> ResumableLoader | None:
        loader = getattr(self._trainer, 'train_dataloader', None)
        return loader if isinstance(loader, ResumableLoader) else None
