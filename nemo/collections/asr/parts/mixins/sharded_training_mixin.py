# SPDX-License-Identifier: Apache-2.0
"""Training with sharded weights, gradients and optimizer states (FSDP2). New in this project."""

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nemo.collections.asr.parts.utils import fully_shard_strategy  # noqa: F401  (registers the strategy)


class ShardedTrainingMixin(LightningModule):
    """Lets an SSL model train under ``trainer.strategy: fully_shard`` (torch's FSDP2).

    Layers and decoders are gathered when they compute, in the precision that they compute in.
    """

    def configure_model(self) -> None:
        """Shard the weights, if the strategy does; ValueError if it shards layers, too (``tensor_parallel_size``)."""
        super().configure_model()
        mesh = self.device_mesh
        if mesh is None or self._is_sharded():
            return
        if mesh['tensor_parallel'].size() > 1:
            raise ValueError(
                f"trainer.strategy.tensor_parallel_size is {mesh['tensor_parallel'].size()}; it must be 1: ranks share "
                "weights (data_parallel_size), they do not divide a layer's work"
            )
        computed_in = {'bf16-mixed': torch.bfloat16, '16-mixed': torch.float16}.get(str(self.trainer.precision))
        policy = MixedPrecisionPolicy(param_dtype=computed_in, reduce_dtype=computed_in and torch.float32)
        for module in self._units_to_shard():
            fully_shard(module, mesh=mesh['data_parallel'], mp_policy=policy)

    def _units_to_shard(self) -> Iterator[nn.Module]:
        """Yield what is gathered at a time: inner modules first, and all that have weights to train."""
        yield from self.encoder.layers
        for module in self.children():
            decoders = module if isinstance(module, nn.ModuleList) else [module]
            if any(weight.requires_grad for weight in module.parameters()):
                yield from decoders

    def _is_sharded(self) -> bool:
        return any(isinstance(weight, DTensor) for weight in self.parameters())

    def on_save_checkpoint(self, checkpoint) -> None:
        """Write the config as plain containers, which Lightning reads, to a folder of shards."""
        super().on_save_checkpoint(checkpoint)
        if getattr(self.trainer.strategy, '_save_distributed_checkpoint', False):
            checkpoint.pop('hparams_type', None)
            if OmegaConf.is_config(checkpoint.get('hyper_parameters')):
                checkpoint['hyper_parameters'] = OmegaConf.to_container(checkpoint['hyper_parameters'])

    def save_to(self, save_path: str) -> None:
        """Save a ``.nemo`` file as NeMo does; sharded weights are gathered, so every rank has to call it."""
        if self._is_sharded():
            whole = get_model_state_dict(self, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            self.state_dict = lambda *args, **kwargs: whole  # on the CPU of the first rank
        try:
            super().save_to(save_path)
        finally:
            self.__dict__.pop('state_dict', None)
