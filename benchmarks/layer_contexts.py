# SPDX-License-Identifier: Apache-2.0
"""What per-layer attention contexts cost: encoder forward and backward with them, against one context for all layers.

    python benchmarks/layer_contexts.py                       # the size of NEST Large, 8 x 16 s, takes minutes on a CPU
    python benchmarks/layer_contexts.py --layers 4 --d-model 128 --batch-size 2

Both are run in turn, in changing order; the ratio is the median over pairs. CPU time, of all threads, leaves out what
others do on the same machine.
"""

import argparse
import statistics
from functools import partial
from importlib.metadata import version

import torch
from attention_cases import schedule
from measure import Seconds, in_turn, ratio, timed

from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder

FEATURES = 80
HOP_SECONDS = 0.01
CONTEXT = [320, 0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--layers', type=int, default=17, help='3 or more')
    parser.add_argument('--d-model', type=int, default=512)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--seconds', type=float, default=16.0, help='of audio in each utterance')
    parser.add_argument('--pairs', type=int, default=10, help='timed runs of each')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--sdpa', action='store_true', help="PyTorch's scaled_dot_product_attention")
    return parser.parse_args()


def make_encoder(options: argparse.Namespace) -> ConformerEncoder:
    """Return the encoder of the hierarchical configuration, in training, without dropout."""
    torch.manual_seed(0)
    encoder = ConformerEncoder(
        feat_in=FEATURES,
        n_layers=options.layers,
        d_model=options.d_model,
        n_heads=8,
        subsampling='dw_striding',
        subsampling_factor=8,
        subsampling_conv_channels=256,
        causal_downsampling=True,
        conv_kernel_size=9,
        conv_norm_type='layer_norm',
        conv_context_size='causal',
        att_context_size=CONTEXT,
        use_pytorch_sdpa=options.sdpa,
        dropout=0.0,
        dropout_pre_encoder=0.0,
        dropout_emb=0.0,
    )
    return encoder.to(options.device).train()


def run(encoder: ConformerEncoder, features: torch.Tensor, lengths: torch.Tensor, contexts) -> Seconds:
    """Time a forward and a backward pass with these contexts of the layers."""
    encoder.set_layer_att_context_size(contexts)
    encoder.zero_grad()

    def passes():
        encoded, _ = encoder(audio_signal=features, length=lengths)
        encoded.square().mean().backward()

    return timed(passes)


def main() -> None:
    """Time both and print the table."""
    options = arguments()
    encoder = make_encoder(options)
    frames = int(options.seconds / HOP_SECONDS)
    features = torch.randn(options.batch_size, FEATURES, frames, device=options.device)
    lengths = torch.full((options.batch_size,), frames, device=options.device)
    variants = {'one context': None, 'per layer': schedule(options.layers)}
    runs = {name: partial(run, encoder, features, lengths, contexts) for name, contexts in variants.items()}
    seconds = in_turn(runs, options.pairs)
    device = (
        torch.cuda.get_device_name()
        if options.device.startswith('cuda')
        else f'CPU, {torch.get_num_threads()} threads'
    )
    print(f"NeMo {version('nemo_toolkit')}, torch {torch.__version__}, {device}")
    print(
        f'{options.layers} layers of {options.d_model}, {options.batch_size} x {options.seconds:g} s, sdpa {options.sdpa}, '
        f'layer contexts {schedule(options.layers)} in {CONTEXT}, forward + backward, {options.pairs} pairs'
    )
    print(f"{'median seconds':<16}{'one context':>14}{'per layer':>14}{'ratio':>8}   (its quartiles)")
    for index, clock in enumerate(('by the clock', 'of CPU time')):
        one, own = ([both[index] for both in values] for values in seconds.values())
        low, middle, high = ratio(own, one)
        print(
            f'{clock:<16}{statistics.median(one):>14.4f}{statistics.median(own):>14.4f}'
            f'{middle:>8.3f}   ({low:.3f} to {high:.3f})'
        )


if __name__ == '__main__':
    main()
