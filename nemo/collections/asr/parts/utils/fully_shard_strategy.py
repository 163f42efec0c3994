# SPDX-License-Identifier: Apache-2.0
"""``trainer.strategy: fully_shard``; training continues while its checkpoints are written. New here."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.strategies.model_parallel import _METADATA_FILENAME
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import distributed
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO


class PendingSaves(AsyncFinalizableCheckpointIO):
    """Saves that are being written, in order; NeMo requires this type for ``async_save``."""

    def __init__(self) -> None:
        _WrappingCheckpointIO.__init__(self, TorchCheckpointIO())  # the queue of NeMo's class needs megatron-core
        self.pending: list[tuple[Future, Callable[[], None]]] = []
        self.thread = ThreadPoolExecutor(1)

    def connect(self) -> None:
        """Make groups of their own: one for the writing threads, one to find out whether all have written."""
        self.writers, self.askers = (distributed.new_group(backend='gloo') for _ in range(2))

    def begin(self, state: dict, folder: Path, finalize: Callable[[], None]) -> None:
        """Copy a state to memory, and write it to a folder after those that are pending."""
        state = BlockingAsyncStager().stage(state)
        written = self.thread.submit(save, state, checkpoint_id=folder, process_group=self.writers)
        self.pending.append((written, finalize))

    def maybe_finalize_save_checkpoint(self, blocking: bool = False) -> bool:
        """Finalize what all ranks have written, or with ``blocking`` all saves; return whether there was one.

        Raises:
            CheckpointException: of a save that failed on any rank, naming the rank and the cause.
        """
        finalized = False
        while self.pending and (blocking or self._is_first_written()):
            written, finalize = self.pending.pop(0)
            written.result()
            finalize()
            finalized = True
        return finalized

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
        super().__init__(**settings, tensor_parallel_size=1)
        self.saves = self.checkpoint_io = PendingSaves()

    def setup_environment(self) -> None:
        """Connect the ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        self.saves.connect()

    def save_checkpoint(self, checkpoint, filepath, storage_options=None) -> None:
        """Begin to save; without ``async_save``, save at once."""
        if storage_options is None:
            return super().save_checkpoint(checkpoint, filepath)
        folder = Path(self.broadcast(filepath))
        folder.mkdir(parents=True, exist_ok=True)
        optimizers = enumerate(checkpoint.pop('optimizer_states', []))
        state = {'state_dict': checkpoint.pop('state_dict'), **{f'optimizer_{i}': state for i, state in optimizers}}
        partial = folder / f'{_METADATA_FILENAME}.partial'
        if self.is_global_zero:
            torch.save(checkpoint, partial)

        def finalize() -> None:
            if self.is_global_zero:
                partial.rename(folder / _METADATA_FILENAME)
            storage_options['finalize_fn']()

        self.saves.begin(state, folder, finalize)

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
