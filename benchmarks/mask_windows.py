# SPDX-License-Identifier: Apache-2.0
"""Draw masked frames without a visible frame in their window, for stock's masks and this project's.

    python benchmarks/mask_windows.py [--output docs/pictures/mask_windows.png] [--left 5] [--seconds 8] [--seed 28]

Both rows have NEST's settings (blocks of 40 feature frames, ``mask_prob`` 0.01) and the same random numbers. Prints
the shares of masked frames without a visible frame over 300 utterances: in one layer's attention window, and in the
receptive field of a stack of two layers with causal convolutions of 9 frames.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from measure import Quick

from nemo.collections.asr.modules.ssl_modules.masking import RandomBlockMasking
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.visible_frames import (
    MASK_THRESHOLD,
    masked_share_per_frame,
    no_visible_frame,
)
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.utils.atomic_files import replacing

FACTOR, FRAMES_PER_SECOND = 8, 100
UTTERANCES = 300
ROWS = {'stock NeMo': UNLIMITED, 'this project': None}
COLOURS = {
    'visible': '#d9d9d9',
    'masked, visible frame in its window': '#4c78a8',
    'masked, no visible frame in its window': '#e45756',
}
LAYERS, CONVOLUTION = 2, 8  # of the stack; frames before its own that a layer's convolution sees


class Frames(NamedTuple):
    """Attention frames of one utterance, [A] bool."""

    masked: torch.Tensor
    in_window: torch.Tensor
    """Masked, without a visible frame in one layer's attention window."""
    in_stack: torch.Tensor
    """Masked, without a visible frame in the receptive field of the stack."""


def draw_masks(left: int, seconds: float, seed: int) -> dict[str, Frames]:
    """Draw the masks of each row.

    Args:
        left: what the attention sees of the past, in attention frames of 80 ms.
        seconds: length of the utterance.
        seed: of both rows.
    """
    masking = RandomBlockMasking(
        feat_in=1, mask_prob=0.01, block_size=40, allow_overlap=True, subsampling_factor=FACTOR
    )
    frames, window = int(seconds * FRAMES_PER_SECOND), Window(AttContext(left, 0))
    found = {}
    for row, given in ROWS.items():
        torch.manual_seed(seed)
        masks = masking.draw(torch.tensor([frames]), frames, effective_left_context=left if given is None else given)
        share = masked_share_per_frame(masks, FACTOR)
        stack = Window(AttContext(LAYERS * (left + CONVOLUTION), 0))
        lost = (no_visible_frame(share, seen)[0] for seen in (window, stack))
        found[row] = Frames(share[0] > MASK_THRESHOLD, *lost)
    return found


def mean_shares(left: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Return the shares of masked frames without a visible frame in window and stack, over utterances."""
    drawn = [draw_masks(left, seconds, seed) for seed in range(UTTERANCES)]
    shares = {}
    for row in ROWS:
        masked, window, stack = (sum(int(kind.sum()) for kind in kinds) for kinds in zip(*(of[row] for of in drawn)))
        shares[row] = window / masked, stack / masked
    return shares


def figure(rows: dict[str, Frames], left: int):
    """Draw the rows, and the window of a frame that has no visible frame in it under stock masks.

    Args:
        rows: of :func:`draw_masks`.
        left: see there.

    Raises:
        ValueError: if every masked frame has a visible frame in its window: another seed shows one.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    lost = next(iter(rows.values())).in_window.nonzero().flatten().tolist()
    if not lost:
        raise ValueError("every masked frame has a visible frame in its window; take another --seed")
    shown = lost[-1]
    drawing = Figure(figsize=(9, 2.5), layout='constrained')
    axes = drawing.subplots(len(rows), 1, sharex=True)
    for axis, (title, frames) in zip(axes, rows.items()):
        kinds = frames.masked.int() + frames.in_window.int()
        for place, kind in enumerate(kinds.tolist()):
            axis.add_patch(Rectangle((place + 0.06, 0), 0.88, 1, color=list(COLOURS.values())[kind]))
        axis.add_patch(Rectangle((shown - left, -0.18), left + 1, 1.36, fill=False, lw=2, clip_on=False))
        axis.set(xlim=(0, len(kinds)), ylim=(-0.25, 1.25), yticks=[])
        lost_share = frames.in_window.sum() / frames.masked.sum().clamp(min=1)
        axis.set_title(
            f'{title}: {lost_share:.0%} of the masked frames have no visible frame in their window',
            loc='left',
            fontsize=9,
        )
        axis.spines[:].set_visible(False)
    axes[-1].set_xlabel(
        f'attention frames of 80 ms; the box is the window of frame {shown} in context [{left}, 0]', fontsize=9
    )
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    drawing.legend(handles=handles, ncols=3, loc='outside lower center', fontsize=8, frameon=False)
    return drawing


def main(argv=None) -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument('--quick', action=Quick, small=dict(seconds=4.0))
    parser.add_argument('--output', type=Path, default=root / 'docs/pictures/mask_windows.png')
    parser.add_argument('--left', type=int, default=5, help='left context in attention frames')
    parser.add_argument('--seconds', type=float, default=8.0)
    parser.add_argument('--seed', type=int, default=28)
    options = parser.parse_args(argv)
    made = figure(draw_masks(options.left, options.seconds, options.seed), options.left)
    with replacing(options.output) as partial:
        made.savefig(partial, dpi=120, format='png', metadata={'Software': None})
    print(f'{options.output}; of {UTTERANCES} utterances:')
    for row, (window, stack) in mean_shares(options.left, options.seconds).items():
        print(
            f'  {row}: {window:.1%} of the masked frames have no visible frame in their window, {stack:.1%} in the stack'
        )


if __name__ == '__main__':
    main()
