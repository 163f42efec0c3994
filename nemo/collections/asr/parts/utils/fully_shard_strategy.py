# SPDX-License-Identifier: Apache-2.0
"""``trainer.strategy: fully_shard``; training continues while its checkpoints are written. New here."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry, model_parallel
from torch import distributed
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO


class PendingSaves(AsyncFinalizableCheckpointIO):
    """Saves in progress, in order, by connected ranks; NeMo requires this type for ``async_save``."""

    def __init__(self) -> None:
        _WrappingCheckpointIO.__init__(self, TorchCheckpointIO())  # the queue of NeMo's class needs megatron-core
        self.pending: list[tuple[Future, Callable[[], None]]] = []
        self.thread = ThreadPoolExecutor(1)
        self.writers = distributed.new_group(backend='gloo')  # for the writing threads of all ranks
        self.askers = distributed.new_group(backend='gloo')  # to find out whether all have written

    def begin(self, finalize: Callable[[], None], state: dict, folder: Path) -> None:
        """Copy a state to memory, and write it to a folder after those that are pending."""
        state = BlockingAsyncStager().stage(state)
        written = self.thread.submit(save, state, checkpoint_id=folder, process_group=self.writers)
        self.pending.append((written, finalize))

    def maybe_finalize_save_checkpoint(self, blocking: bool = False) -> None:
        """Finalize what all ranks have written, or with ``blocking`` all saves.

        Raises:
            CheckpointException: of a save that failed on any rank, naming the rank and the cause.
        """
        while self.pending and (blocking or self._is_first_written()):
            written, finalize = self.pending.pop(0)
            written.result()
            finalize()

    def _is_first_written(self) -> bool:
        done = torch.tensor(float(self.pending[0][0].done()))
        distributed.all_reduce(done, distributed.ReduceOp.MIN, group=self.askers)
        return bool(done)

    def teardown(self) -> None:
        """Leave pending saves unfinished, as a rank may be lost; NeMo removes them at the next start."""


class FullyShardStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` with the weights sharded over all ranks.

    Checkpoints are folders, to which each rank writes its shard. With
    ``exp_manager.checkpoint_callback_params.async_save: true`` training waits only until the shards are copied to
    memory. A checkpoint counts, and replaces others, when all ranks have written it; the end of training waits for that.
    """

    def __init__(self, **settings) -> None:
        super().__init__(**settings, tensor_parallel_size=1, save_distributed_checkpoint=True)

    def setup_environment(self) -> None:
        """Connect the ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        self.saves = self.checkpoint_io = PendingSaves()

    def save_checkpoint(self, checkpoint, filepath, storage_options=None) -> None:
        """Begin to save; without ``async_save``, save at once."""
        if storage_options is None:
            return super().save_checkpoint(checkpoint, filepath)
        begin = partial(self.saves.begin, storage_options['finalize_fn'])  # which removes NeMo's mark `-unfinished`
        with mock.patch.object(model_parallel, '_distributed_checkpoint_save', begin):  # no method writes the shards
            super().save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path):
        """Load a checkpoint, after all pending saves."""
        self.saves.maybe_finalize_save_checkpoint(blocking=True)
        return super().load_checkpoint(checkpoint_path)

    def on_train_batch_start(self, *args, **kwargs) -> None:
        """Finalize what is written by now."""
        super().on_train_batch_start(*args, **kwargs)
        self.saves.maybe_finalize_save_checkpoint()

    def on_train_end(self) -> None:
        """Wait for pending saves."""
        super().on_train_end()
        self.saves.maybe_finalize_save_checkpoint(blocking=True)


StrategyRegistry.register('fully_shard', FullyShardStrategy)
