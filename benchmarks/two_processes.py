# SPDX-License-Identifier: Apache-2.0
"""Compare the throughput of two processes of one thread with that of one; gradients go through gloo.

    python benchmarks/two_processes.py [--turns 7]

Each process has batches of its own; forward, backward with torch's DistributedDataParallel, AdamW. One process alone
and the two take turns; a turn is some steps, and the two start each step together, as DDP makes them.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import Quick

CONFIG = Path(__file__).resolve().parents[1] / 'examples/asr/conf/ssl/nest/nest_fast-conformer_streaming.yaml'
MODELS = {'tiny (4 x 96)': (4, 96, 4, 64, 32), '8 x 256': (8, 256, 4, 1024, 256)}
UTTERANCES, SECONDS, RATE = 8, 4.0, 16000
STEPS = 4  # of a turn


class Step(torch.nn.Module):
    """The loss of a batch, as a training step computes it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        """Return the loss."""
        with self.model._one_context():
            record = self.model.encode_batch(batch, self.model.masking_in_context())
            return self.model.objectives.loss(record).loss


def build(layers: int, width: int, heads: int, classes: int, channels: int):
    """Build a denoising model of the shipped config in a size."""
    from omegaconf import OmegaConf

    from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

    cfg = OmegaConf.load(CONFIG)
    cfg.model.encoder.update(n_layers=layers, d_model=width, n_heads=heads, subsampling_conv_channels=channels)
    cfg.model.num_classes = classes
    OmegaConf.resolve(cfg)
    del cfg.model.train_ds, cfg.model.validation_ds, cfg.model.optim
    cfg.model.log_figures, cfg.model.audit_every_n_batches = False, None
    torch.manual_seed(0)
    return EncDecDenoiseMaskedTokenPredModel(cfg.model).train()


def batch_of(seed: int):
    """Return noise, as a data loader gives it."""
    from nemo.collections.asr.data.ssl_dataset import AudioNoiseBatch

    audio = 0.1 * torch.randn(UTTERANCES, int(SECONDS * RATE), generator=torch.Generator().manual_seed(seed))
    lengths = torch.full((UTTERANCES,), audio.shape[1])
    return AudioNoiseBatch(None, audio, lengths, 0.1 * audio, lengths, 1.1 * audio, lengths)


def worker(name: str, turns: int) -> None:
    """Train; rank 0 prints the seconds of each turn, alone and together."""
    rank = int(os.environ['RANK'])
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')
    model = build(*MODELS[name])
    alone, together = Step(model), torch.nn.parallel.DistributedDataParallel(Step(model), find_unused_parameters=False)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    batch = batch_of(rank)

    def steps(module) -> float:
        model.encoder.sync_max_audio_length = module is together  # NeMo reduces the longest length over all ranks
        start = time.perf_counter()
        for _ in range(STEPS):
            optimizer.zero_grad()
            module(batch).backward()
            optimizer.step()
        return time.perf_counter() - start

    seconds = {'alone': [], 'together': []}
    for _ in range(turns + 1):
        torch.distributed.barrier()
        if rank == 0:
            seconds['alone'].append(steps(alone))
        torch.distributed.barrier()
        seconds['together'].append(steps(together))
    if rank == 0:
        print(json.dumps({way: taken[1:] for way, taken in seconds.items()}))
    torch.distributed.destroy_process_group()


def measure(name: str, turns: int) -> dict:
    """Run two processes; return the seconds of each turn."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        address = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(probe.getsockname()[1]), 'WORLD_SIZE': '2'}
    command = [sys.executable, __file__, '--worker', name, '--turns', str(turns)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **address, 'RANK': str(rank), 'OMP_NUM_THREADS': '1'},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    answers = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f'a process ended with status {max(rank.returncode for rank in ranks)}')
    return json.loads(answers[0].splitlines()[-1])


def main(argv=None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--turns', type=int, default=7)
    parser.add_argument('--quick', action=Quick, small=dict(turns=2))
    parser.add_argument('--worker', choices=list(MODELS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        worker(options.worker, options.turns)
        return
    audio = STEPS * UTTERANCES * SECONDS
    print('| model | audio a second, alone | together | together / alone (quartiles) |\n| --- | ---: | ---: | ---: |')
    for name in list(MODELS)[: 1 if options.quick else None]:
        taken = measure(name, options.turns)
        ratios = [2 * alone / together for alone, together in zip(taken['alone'], taken['together'])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speeds = [audio / statistics.median(taken['alone']), 2 * audio / statistics.median(taken['together'])]
        print(
            f'| {name} | {speeds[0]:.0f} s | {speeds[1]:.0f} s | {middle:.2f} ({low:.2f} to {high:.2f}) |', flush=True
        )


if __name__ == '__main__':
    main()
