# SPDX-License-Identifier: Apache-2.0
"""Profile a training step by part of the model and by operator.

    python benchmarks/profile_step.py                         # 4 x 16 s, d_model 176, 16 layers
    NEMO_STREAMING_SSL=0 python benchmarks/profile_step.py    # the same step of stock NeMo

The forward pass of each part is timed on its own; the backward pass, which runs through all of them, as a whole, and
by operator.
"""

import argparse
import time
from collections import defaultdict

import torch
from measure import Quick
from torch.profiler import ProfilerActivity, profile
from training_step_cases import is_patched, step_model

PARTS = {
    'features': 'preprocessor',
    'masking': 'mask_processor',
    'targets': 'quantizer',
    'subsampling': 'encoder.pre_encode',
    'decoder': 'decoder',
}


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--seconds', type=float, default=16.0, help='seconds of audio in each utterance')
    parser.add_argument('--d-model', type=int, default=176)
    parser.add_argument('--layers', type=int, default=16)
    parser.add_argument('--steps', type=int, default=5, help='timed steps, after one to warm up')
    parser.add_argument('--operators', type=int, default=12, help='operators to list')
    parser.add_argument('--quick', action=Quick, small=dict(batch=1, seconds=2.0, d_model=32, layers=2, steps=1))
    return parser.parse_args(argv)


def watch(model: torch.nn.Module, spent: dict) -> None:
    """Add up the seconds of the parts' forward passes."""
    parts = {name: model.get_submodule(path) for name, path in PARTS.items()}
    for module in parts.values():  # what they are called by: the model calls some, the encoder others
        module.register_forward_pre_hook(lambda module, *_: setattr(module, 'started', time.perf_counter()))
    for name, module in parts.items():
        module.register_forward_hook(
            lambda module, *_, name=name: spent.update({name: spent[name] + time.perf_counter() - module.started})
        )
    for layer in model.encoder.layers:
        layer.register_forward_pre_hook(lambda module, *_: setattr(module, 'started', time.perf_counter()))
        layer.register_forward_hook(
            lambda module, *_: spent.update({'layers': spent['layers'] + time.perf_counter() - module.started})
        )


def run(model, batch, spent: dict) -> None:
    """Take one training step and add up the seconds of its passes."""
    model._optimizer.zero_grad()
    start = time.perf_counter()
    loss = model.training_step(batch, 0)['loss']
    forward = time.perf_counter()
    loss.backward()
    backward = time.perf_counter()
    model._optimizer.step()
    spent['forward, all of it'] += forward - start
    spent['backward'] += backward - forward
    spent['optimizer'] += time.perf_counter() - backward


def main(argv=None) -> None:
    """Time the parts, then the operators, and print both."""
    options = arguments(argv)
    case = dict(batch=options.batch, seconds=options.seconds, d_model=options.d_model, layers=options.layers)
    model, batch = step_model({**case, 'contexts': [[80, 0], [-1, 0]]})
    run(model, batch, defaultdict(float))
    spent: dict = defaultdict(float)
    watch(model, spent)
    for _ in range(options.steps):
        run(model, batch, spent)
    whole = sum(spent[name] for name in ('forward, all of it', 'backward', 'optimizer'))
    print(f"{'patched' if is_patched() else 'stock'}, {case}, torch {torch.__version__}")
    print(f'a step takes {whole / options.steps * 1000:.0f} ms')
    for name, seconds in spent.items():
        print(f'{name:<24}{seconds / options.steps * 1000:>9.1f} ms{seconds / whole:>8.1%}')
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run(model, batch, defaultdict(float))
    events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    for event in events[: options.operators]:
        print(f'{event.key:<40}{event.self_cpu_time_total / total:>8.1%}{event.count:>7} calls')


if __name__ == '__main__':
    main()
