# SPDX-License-Identifier: Apache-2.0
"""Estimate memory, operations and scaling of a training step by encoder, audio and precision.

    python benchmarks/sizing.py [--batch 120] [--markdown sizing.md]
    python benchmarks/sizing.py --only measured          # the predictions against steps on this CPU

The encoder runs forward and backward on torch's meta device, which computes nothing: the operations are counted, and
the bytes that the forward pass keeps for the backward pass. To these come weights, gradients and the optimiser's
moments (16 bytes of each parameter; with bf16-mixed 2 more for the cast weights), and the decoder on the masked third of
the frames. What is not in it: the allocator's gaps, the CUDA context (about 0.5 GB), workspaces of the kernels.

Scaling is arithmetic from assumed rates, not a measurement: ``--operations`` in a second that a device reaches,
``--link`` bytes in a second that each rank sends. A ring sends 2 (N - 1) / N times the gradients' bytes, and DDP does so
while the backward pass, two thirds of a step, goes on.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from measure import GIVE_BACK, Quick, machine_rates, peak_memory, timed
from omegaconf import OmegaConf
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

CONFIG = Path(__file__).resolve().parents[1] / 'examples/asr/conf/ssl/nest/nest_fast-conformer_streaming.yaml'
SIZES = {'17 x 512': (17, 512, 8), '24 x 1024': (24, 1024, 8), '42 x 1024': (42, 1024, 8)}
QUICK = {'2 x 64': (2, 64, 4)}
PRECISIONS = {'float32': torch.float32, 'bf16-mixed': torch.bfloat16}
CONTEXTS = ([80, 0], [-1, 0])
SECONDS = (15.0, 60.0)
FRAMES_A_SECOND = 100  # of features
MASKED = 1 / 3  # of the frames, which are decoded
CLASSES = 8192
STATE = 16  # bytes of a parameter: weight, gradient, two moments
RANKS = (1, 8, 64, 512)
GIGA = 1e9
CHECKPOINTING = ('every_2', 'layers')  # of encoder.activation_checkpointing
MEASURED = [(4, 176, 4, 2, 16.0, [80, 0]), (4, 176, 4, 2, 32.0, [80, 0]), (8, 256, 4, 2, 16.0, [-1, 0])]


class Need(NamedTuple):
    """What a step takes."""

    parameters: int
    operations: float
    """Forward and backward, two for each multiplication with its addition."""
    activations: float
    """Bytes kept for the backward pass."""
    layers: int

    def memory(self, mixed: bool, checkpointed_inputs: float = 0.0) -> float:
        """Bytes in all; with the inputs of the layers in the place of most activations, if they are given."""
        kept = self.activations
        if checkpointed_inputs:
            kept = checkpointed_inputs + kept / self.layers  # of the layer that is computed anew
        return self.parameters * (STATE + 2 * mixed) + kept


def encoder(layers: int, width: int, heads: int, context: list, checkpointing: str = 'none'):
    """Build the streaming encoder in a size."""
    from nemo.collections.asr.modules import ConformerEncoder

    cfg = OmegaConf.load(CONFIG).model
    cfg.encoder.update(n_layers=layers, d_model=width, n_heads=heads, att_context_size=context)
    options = OmegaConf.to_container(cfg, resolve=True)['encoder']
    del options['_target_']
    return ConformerEncoder(**{**options, 'activation_checkpointing': checkpointing})


def step_of(model, batch: int, seconds: float, device: str, dtype: torch.dtype):
    """Return what runs the encoder forward, and its sum backward."""
    frames = int(seconds * FRAMES_A_SECOND)
    features = torch.zeros(batch, model._feat_in, frames, dtype=dtype, device=device)
    lengths = torch.full((batch,), frames, device=device)

    def run():
        encoded, _ = model(audio_signal=features, length=lengths)
        encoded.sum().backward()

    return run


def count(model, batch: int, seconds: float, dtype: torch.dtype) -> Need:
    """Count what a step takes, on the meta device."""
    model = model.to('meta').to(dtype).train()
    model.zero_grad()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes(), storage  # held, or its number would be given out again
        return tensor

    with FlopCounterMode(display=False) as operations, saved_tensors_hooks(keep, lambda tensor: tensor):
        step_of(model, batch, seconds, 'meta', dtype)()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    decoded = MASKED * batch * seconds * FRAMES_A_SECOND / model.subsampling_factor
    return Need(
        parameters + CLASSES * model.d_model,
        operations.get_total_flops() + 6 * decoded * CLASSES * model.d_model,
        sum(size for size, _ in kept.values()) + 2 * 4 * decoded * CLASSES,  # logits and their log-softmax
        len(model.layers),
    )


def sizes(batch_seconds: float) -> list[str]:
    """Return the lines of the table of sizes."""
    lines = [
        '| encoder | parameters, M | context | utterances | precision | operations, 10^12 | memory, GB | checkpointed, GB |',
        '| --- | ---: | --- | --- | --- | ---: | ---: | ---: |',
    ]
    cases = [(name, context) for name in SIZES for context in CONTEXTS]
    for name, context in tqdm(cases, desc='counting', unit='encoder', leave=False):
        model = encoder(*SIZES[name], context)
        for seconds in SECONDS:
            batch = max(1, int(batch_seconds / seconds))
            frames = batch * seconds * FRAMES_A_SECOND / model.subsampling_factor
            for precision, dtype in PRECISIONS.items():
                need = count(model, batch, seconds, dtype)
                mixed = precision != 'float32'
                inputs = frames * model.d_model * dtype.itemsize * need.layers
                lines.append(
                    f'| {name} | {need.parameters / 1e6:.0f} | `{context}` | {batch} x {seconds:.0f} s | {precision} | '
                    f'{need.operations / 1e12:.1f} | {need.memory(mixed) / GIGA:.1f} | '
                    f'{need.memory(mixed, inputs) / GIGA:.1f} |'
                )
    return lines


def scaling(encoders: dict, batch_seconds: float, operations: float, link: float) -> list[str]:
    """Return the lines of the table of scaling."""
    columns = ' | '.join('1 rank' if ranks == 1 else f'{ranks} ranks' for ranks in RANKS)
    lines = [
        f'| encoder | gradients, GB | computation, ms | {columns} |',
        f'| --- | ---: | ---: |{" ---: |" * len(RANKS)}',
    ]
    for name, size in encoders.items():
        need = count(encoder(*size, [80, 0]), max(1, int(batch_seconds / 15)), 15.0, torch.bfloat16)
        compute, sent = need.operations / operations, 4 * need.parameters
        shares = []
        for ranks in RANKS:
            sending = 2 * (ranks - 1) / ranks * sent / link
            shares.append(compute / (compute / 3 + max(2 * compute / 3, sending)))
        lines.append(
            f'| {name} | {sent / GIGA:.2f} | {1000 * compute:.0f} | {" | ".join(f"{share:.0%}" for share in shares)} |'
        )
    return lines


def measured() -> list[str]:
    """Return the lines that hold predictions against steps of this process."""
    torch.set_num_threads(1)
    rate = machine_rates()['operations_per_second']
    lines = [
        f'This CPU, one thread: {rate / 1e9:.0f} x 10^9 operations a second in a matrix product.',
        '',
        '| encoder | utterances | context | kept, MB | peak, MB | error | '
        + ' | '.join(f'peak `{choice}`, MB' for choice in CHECKPOINTING)
        + ' | operations, 10^9 | seconds | of the rate |',
        '| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for layers, width, heads, batch, seconds, context in MEASURED:
        need = count(encoder(layers, width, heads, context), batch, seconds, torch.float32)
        model = encoder(layers, width, heads, context).train()
        run = step_of(model, batch, seconds, 'cpu', torch.float32)
        run()  # gradients are there from now on
        decoded = MASKED * batch * seconds * FRAMES_A_SECOND / model.subsampling_factor
        kept = (need.activations - 8 * decoded * CLASSES) / 1e6
        operations = need.operations - 6 * decoded * CLASSES * width
        peak, taken = peak_memory(run), timed(run, 2.0).cpu
        checkpointed = []
        for choice in CHECKPOINTING:
            model = encoder(layers, width, heads, context, choice).train()
            again = step_of(model, batch, seconds, 'cpu', torch.float32)
            again()
            checkpointed.append(peak_memory(again))
        lines.append(
            f'| {layers} x {width} | {batch} x {seconds:.0f} s | `{context}` | {kept:.0f} | {peak:.0f} | '
            f'{peak / kept - 1:+.0%} | {" | ".join(f"{found:.0f}" for found in checkpointed)} | '
            f'{operations / 1e9:.0f} | {taken:.2f} | {operations / taken / rate:.0%} |'
        )
    return lines


def main(argv=None) -> int:
    """Print the tables, and write them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=('sizes', 'scaling', 'measured'), nargs='+')
    parser.add_argument('--batch', type=float, default=120.0, help='seconds of audio in a step of one device')
    parser.add_argument('--operations', type=float, default=120e12, help='operations per second of a device')
    parser.add_argument('--link', type=float, default=20e9, help='bytes per second that each rank sends')
    parser.add_argument('--markdown', type=Path, help='also write the tables to this file')
    parser.add_argument('--quick', action=Quick, small=dict(only=['scaling']))
    options = parser.parse_args(argv)
    if min(options.batch, options.operations, options.link) <= 0:
        parser.error('--batch, --operations and --link must be above 0')
    tables = {
        'sizes': lambda: sizes(options.batch),
        'scaling': lambda: scaling(QUICK if options.quick else SIZES, options.batch, options.operations, options.link),
        'measured': measured,
    }
    text = '\n\n'.join('\n'.join(make()) for name, make in tables.items() if name in (options.only or tables)) + '\n'
    print(text)
    if options.markdown:
        from nemo.utils.atomic_files import write_text

        write_text(options.markdown, text)
    return 0


if __name__ == '__main__':
    import os

    if any(os.environ.get(name) != value for name, value in GIVE_BACK.items()):  # read when the process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **GIVE_BACK})
    sys.exit(main())
