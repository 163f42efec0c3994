# SPDX-License-Identifier: Apache-2.0
"""What the guard against NaN costs a training step: looking at the batch and at the gradients, against the step.

    python benchmarks/nonfinite_guard.py [--d_model 176] [--layers 16] [--batch 4] [--seconds 16] [--steps 20]

Whole optimizer steps with and without the guard, interleaved in pairs; the median ratio and its quartiles. On a GPU
each step is timed without a wait of its own, for the guard's cost there is that it makes the host wait.
"""

import argparse
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))

import torch
from measure import in_turn, ratio, timed
from tiny_nest import noise_batch, tiny_model

from nemo.collections.asr.parts.utils.nonfinite_guard import gradient_norm, invalid_utterances
from nemo.utils.atomic_files import replacing

GROUP = 5  # steps that are timed together, so that a GPU's queue can fill


def build(options, device):
    """Return a model of the streaming config, its optimizer, and a batch on the CPU."""
    sizes = [f'model.encoder.d_model={options.d_model}', f'model.encoder.n_layers={options.layers}']
    sizes += ['model.encoder.n_heads=4', 'model.encoder.subsampling_conv_channels=176', 'model.num_classes=8192']
    model = tiny_model(*sizes).to(device).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), noise_batch((options.seconds,) * options.batch)


def step(model, optimizer, batch, guarded: bool) -> None:
    """Take a training step as Lightning does, with or without the guard's two looks."""
    if guarded:
        assert invalid_utterances(batch) is None
    batch = model.transfer_batch_to_device(batch, model.device, 0)
    with model._one_context():
        loss = model.objectives.loss(model.encode_batch(batch, model.masking_in_context())).loss
    optimizer.zero_grad()
    loss.backward()
    if guarded:
        assert math.isfinite(gradient_norm(list(model.parameters())))
    optimizer.step()


def steps(number: int, *arguments) -> None:
    """Take so many steps."""
    for _ in range(number):
        step(*arguments)


def main(argv=None) -> None:
    """Measure and print the cost."""
    parser = argparse.ArgumentParser(description='What the guard against NaN costs a training step.')
    parser.add_argument('--d_model', type=int, default=176)
    parser.add_argument('--layers', type=int, default=16)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--seconds', type=float, default=16.0)
    parser.add_argument('--steps', type=int, default=20, help='pairs of groups of steps')
    parser.add_argument('--json', help='also write the figures to this file')
    options = parser.parse_args(argv)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    group = GROUP if device == 'cuda' else 1
    arguments = build(options, device)
    runs = {guarded: partial(timed, partial(steps, group, *arguments, guarded)) for guarded in (False, True)}
    seconds = {
        guarded: [run.clock / group for run in times] for guarded, times in in_turn(runs, options.steps).items()
    }
    low, median, high = ratio(seconds[True], seconds[False])
    step_ms = 1000 * statistics.median(seconds[False])
    result = {'device': device, 'step_ms': step_ms, 'ratio': median, 'quartiles': [low, high]}
    print(
        f"{device}: a step takes {result['step_ms']:.1f} ms; with the guard {median:.4f} x ({low:.4f} to {high:.4f})"
    )
    if options.json:
        with replacing(options.json) as unfinished:
            unfinished.write_text(json.dumps(result) + '\n')


if __name__ == '__main__':
    main()
