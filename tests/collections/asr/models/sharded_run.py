# SPDX-License-Identifier: Apache-2.0
"""One training step on two CPU processes, replicated and sharded; run by test_ssl_models_precision.py.

Usage: sharded_run.py FOLDER, with MASTER_ADDR and MASTER_PORT set. Both ranks have the same batch, so that each must
find what one process finds alone. Leaves FOLDER/RANK.json.
"""

import torch
from ranks import run_ranks
from tiny_nest import TWO_LAYERS, noise_batch, signals, tiny_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def step(model, run) -> dict:
    """The loss, the gradients' norms, and which hooks of a layer ran."""
    hooks, layer = [], model.encoder.layers[1]
    layer.register_forward_hook(lambda *_: hooks.append('forward'))
    layer.register_full_backward_hook(lambda *_: hooks.append('backward'))
    batch = noise_batch((1.0, 0.6))
    torch.manual_seed(0)
    log_probs, lengths, masks, tokens = run(**signals(batch), apply_mask=True)
    loss = model.loss(masks=masks, decoder_outputs=log_probs, targets=tokens, decoder_lengths=lengths)
    loss.backward()
    gradients = [whole(weight.grad).norm().item() for weight in model.parameters() if weight.grad is not None]
    contexts = [context.as_list() for context in model.encoder.layer_att_contexts()]
    model.encoder.layers[0].self_attention.att_context_size = [5, 0]
    narrowed = model.encoder.tightest_left_context()
    return dict(loss=loss.item(), gradients=gradients, hooks=hooks, contexts=contexts, narrowed=narrowed)


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, 'full_tensor') else gradient


def make_model():
    return tiny_model(*TWO_LAYERS, 'model.preprocessor.dither=0.0').train()


def replicated() -> dict:
    model = make_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped.register_comm_hook(None, allreduce_hook)
    return step(model, wrapped)


def sharded() -> dict:
    model, mesh = make_model(), init_device_mesh('cpu', (2,))
    for module in (*model.encoder.layers, model.encoder):
        fully_shard(module, mesh=mesh)
    return step(model, model)


def find(rank, folder):
    alone = make_model()
    return dict(alone=step(alone, alone), replicated=replicated(), sharded=sharded())


if __name__ == '__main__':
    run_ranks(find, 'gloo')
