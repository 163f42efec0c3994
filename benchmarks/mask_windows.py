# SPDX-License-Identifier: Apache-2.0
"""Draw what stock masks ask of a streaming encoder, and what masks that follow its context ask.

    python benchmarks/mask_windows.py [--output docs/pictures/mask_windows.png] [--left 5] [--seconds 8] [--seed 28]

Both rows have NEST's settings (blocks of 40 feature frames, ``mask_prob`` 0.01) and the same random numbers. A masked
frame that sees nothing unmasked in its window cannot be answered: the loss asks for a guess. Prints the shares of 300
utterances.
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
ROWS = {'stock: regardless of the context': UNLIMITED, 'this project: within the context': None}
COLOURS = {'seen': '#d9d9d9', 'masked, answerable': '#4c78a8', 'masked, nothing to answer from': '#e45756'}


class Frames(NamedTuple):
    """Attention frames of one utterance, [A] bool."""

    masked: torch.Tensor
    unanswerable: torch.Tensor


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
    for row, told in ROWS.items():
        torch.manual_seed(seed)
        masks = masking.draw(torch.tensor([frames]), frames, effective_left_context=left if told is None else told)
        share = masked_share_per_frame(masks, FACTOR)
        found[row] = Frames(share[0] > MASK_THRESHOLD, no_visible_frame(share, window)[0])
    return found


def mean_shares(left: int, seconds: float) -> dict[str, float]:
    """Return which share of the masked frames cannot be answered in each row, over utterances of other seeds."""
    drawn = [draw_masks(left, seconds, seed) for seed in range(UTTERANCES)]
    counts = {row: [(frames[row].masked.sum(), frames[row].unanswerable.sum()) for frames in drawn] for row in ROWS}
    return {row: float(sum(lost for _, lost in of) / sum(masked for masked, _ in of)) for row, of in counts.items()}


def figure(rows: dict[str, Frames], left: int):
    """Draw the rows, and over each the window of the frame that stock masks leave without an answer.

    Args:
        rows: of :func:`draw_masks`.
        left: see there.

    Raises:
        ValueError: if stock's masks leave no frame without an answer: another seed shows one.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    lost = next(iter(rows.values())).unanswerable.nonzero().flatten().tolist()
    if not lost:
        raise ValueError("these masks leave no frame without an answer; take another --seed")
    shown = lost[-1]
    drawing = Figure(figsize=(9, 2.5), layout='constrained')
    axes = drawing.subplots(len(rows), 1, sharex=True)
    for axis, (title, frames) in zip(axes, rows.items()):
        kinds = frames.masked.int() + frames.unanswerable.int()
        for place, kind in enumerate(kinds.tolist()):
            axis.add_patch(Rectangle((place + 0.06, 0), 0.88, 1, color=list(COLOURS.values())[kind]))
        axis.add_patch(Rectangle((shown - left, -0.18), left + 1, 1.36, fill=False, lw=2, clip_on=False))
        axis.set(xlim=(0, len(kinds)), ylim=(-0.25, 1.25), yticks=[])
        lost_share = frames.unanswerable.sum() / frames.masked.sum().clamp(min=1)
        axis.set_title(f'{title}: {lost_share:.0%} of the masked frames unanswerable', loc='left', fontsize=9)
        axis.spines[:].set_visible(False)
    axes[-1].set_xlabel(f'attention frames of 80 ms; the box is what frame {shown} sees', fontsize=9)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    drawing.legend(handles=handles, ncols=3, loc='outside lower center', fontsize=8, frameon=False)
    return drawing


def main(argv=None) -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument('--quick', action=Quick, small=dict(seconds=4.0))
    parser.add_argument('--output', type=Path, default=root / 'docs/pictures/mask_windows.png')
    parser.add_argument('--left', type=int, default=5, help='attention frames of the past that a frame sees')
    parser.add_argument('--seconds', type=float, default=8.0)
    parser.add_argument('--seed', type=int, default=28)
    options = parser.parse_args(argv)
    made = figure(draw_masks(options.left, options.seconds, options.seed), options.left)
    with replacing(options.output) as partial:
        made.savefig(partial, dpi=120, format='png', metadata={'Software': None})
    print(f'{options.output}; of {UTTERANCES} utterances:')
    for row, share in mean_shares(options.left, options.seconds).items():
        print(f'  {row}: {share:.1%} of the masked frames unanswerable')


if __name__ == '__main__':
    main()
