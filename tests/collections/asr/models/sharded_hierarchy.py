# SPDX-License-Identifier: Apache-2.0
"""Train the hierarchical config on two ranks under ModelParallelStrategy, and go on; test_ssl_models_sharded.py runs it.

Usage: sharded_hierarchy.py FOLDER, with MASTER_ADDR and MASTER_PORT set. Leaves FOLDER/RANK.json, FOLDER/two.ckpt and
FOLDER/trained.nemo.
"""

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import run_ranks
from tiny_nest import batches, tiny_config, trainer

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel


def model_of():
    torch.manual_seed(0)
    cfg = tiny_config('model.encoder.n_layers=4', name='nest_hierarchical_streaming_tiny').model
    return EncDecDenoiseMaskedTokenPredModel(cfg)


def fit(model, steps: int, ckpt_path=None):
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend='gloo'
    )
    run = trainer(steps, devices=2, strategy=strategy, max_epochs=-1)
    model.set_trainer(run)
    run.fit(model, train_dataloaders=batches(2), ckpt_path=ckpt_path)
    return run


def find(rank, folder):
    model = model_of()
    fit(model, 2).save_checkpoint(folder / 'two.ckpt')
    model.save_to(str(folder / 'trained.nemo'))
    resumed = model_of()
    run = fit(resumed, 4, ckpt_path=folder / 'two.ckpt')
    contexts = [context.as_list() for context in resumed.encoder.layer_att_contexts()]
    return dict(step=run.global_step, contexts=contexts)


if __name__ == '__main__':
    run_ranks(find)
