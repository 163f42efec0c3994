# SPDX-License-Identifier: Apache-2.0
"""Codebook refinement on two CPU processes, and on one; run by test_codebook_refinement.py.

Usage: refinement_run.py FOLDER, with MASTER_ADDR and MASTER_PORT set. Each rank has half of the utterances of each
batch. Leaves FOLDER/RANK.json: the state of both ways, and what each refinement said.
"""

import torch
from ranks import run_ranks

from nemo.collections.asr.modules.ssl_modules.quantizers import RandomProjectionVectorQuantizer

REFINE = dict(every_n_steps=3, until_step=9, decay=0.5)


def train(utterances) -> dict:
    torch.manual_seed(0)
    sizes = dict(feat_in=6, code_dim=4, num_classes=20, num_books=2, combine_time_steps=2)
    quantizer = RandomProjectionVectorQuantizer(**sizes, refine=REFINE)
    batches, logs = torch.Generator().manual_seed(1), []
    for step in range(11):  # in mid-interval at the end
        logs.append({name: value.item() for name, value in quantizer.refine_if_due(step).items()})
        signal = torch.randn(4, 6, 30, generator=batches) + 1
        own = signal[utterances]
        quantizer.observe(own, torch.tensor([15, 11, 15, 7])[utterances], quantizer(input_signal=own)[1])
    return dict(state={name: value.tolist() for name, value in quantizer.state_dict().items()}, logs=logs)


def find(rank, folder):
    alone = train(slice(None))
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    return dict(alone=alone, together=train(slice(2 * rank, 2 * rank + 2)))


if __name__ == '__main__':
    run_ranks(find)
