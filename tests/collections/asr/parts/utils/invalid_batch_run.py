# SPDX-License-Identifier: Apache-2.0
"""A training on two CPU processes, one of which meets a batch without a valid utterance; run by test_nonfinite_guard.py."""

from ranks import gloo_ddp, run_ranks
from tiny_nest import fit, noise_batch, tiny_model
from torch.utils.data import DataLoader


def find(rank, folder):
    model = tiny_model('model.skip_nan_grad=true')
    given = [noise_batch((0.9, 0.5), seed=2 * step + rank) for step in range(3)]
    if rank == 1:
        given[1].audio.fill_(float('nan'))
    fit(model, DataLoader(given, batch_size=None), 3, devices=2, strategy=gloo_ddp())
    weights = sum(weight.double().abs().sum() for weight in model.parameters()).item()
    return {'steps': model._skipped_steps, 'utterances': model._skipped_utterances, 'weights': weights}


if __name__ == '__main__':
    run_ranks(find)
