# SPDX-License-Identifier: Apache-2.0
"""Audit of masks: the masked share, the length of runs, and masked frames without a visible frame.

Shapes: B batch, D features, M mask frames, A attention frames (M // factor), R run lengths from 0 to the longest.

Counts stay on the device of the masks, and nothing synchronises. Windows have names: ``window`` is that of the tightest
layer, ``layers`` that of all layers alike, and ``stack`` that of the whole encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.nn.functional import pad

from nemo.collections.asr.parts.att_context.receptive_field import stack_window
from nemo.collections.asr.parts.att_context.visible_frames import (
    MASK_THRESHOLD,
    masked_share_per_frame,
    no_visible_frame,
    window_of_masking,
)
from nemo.collections.asr.parts.att_context.windows import Window, tightest_window, tightest_window_of
from nemo.collections.asr.parts.objectives.base import BatchRecord


@dataclass
class MaskAudit:
    """Counts of one batch, on its device.

    A frame is an attention frame that is whole within its utterance; above the threshold it counts as masked.
    """

    mask_frames: torch.Tensor
    mask_frames_masked: torch.Tensor  # float64: a masking may hide some features of a frame and not others
    frames: torch.Tensor
    frames_masked: torch.Tensor
    no_visible_frame: dict[str, torch.Tensor]  # for each window, the masked frames without a visible frame in it
    masked: torch.Tensor  # [B, A] bool

    @cached_property
    def runs(self) -> torch.Tensor:
        """How many runs of each number of masked frames there are, [R]."""
        masked = pad(self.masked, (1, 0))  # with an unmasked frame before the first
        index = torch.arange(masked.shape[1], device=masked.device)
        lengths = index - torch.where(masked, 0, index).cummax(dim=1).values  # of the run up to a frame
        ends = masked & ~pad(masked[:, 1:], (0, 1))
        return torch.zeros_like(index).scatter_add_(0, (lengths * ends).flatten(), ends.flatten().long())

    def masked_share(self) -> torch.Tensor:
        """Share of the mask frames that is masked."""
        return self.mask_frames_masked / self.mask_frames.clamp(min=1)

    def no_visible_frame_share(self) -> dict[str, torch.Tensor]:
        """For each window, the share of the masked frames that have no visible frame in it."""
        masked = self.frames_masked.clamp(min=1)
        return {name: count / masked for name, count in self.no_visible_frame.items()}

    def mean_run(self) -> torch.Tensor:
        """Mean length of a run of masked frames, in attention frames."""
        return self.frames_masked / self.runs.sum().clamp(min=1)

    def run_quantile(self, share: float) -> torch.Tensor:
        """Return the shortest length that this share of the runs does not exceed, in attention frames."""
        up_to = self.runs.cumsum(0)
        return (up_to < share * up_to[-1]).sum().float()


def windows_of(encoder) -> dict[str, Window]:
    """Return what each layer attends to in the present context, and what the encoder depends on.

    ``layers`` where all attend alike, else ``layer_00`` and so on; and ``stack``, the receptive field of all layers,
    under ``chunked_limited`` that of the frame that sees most. None at all where the windows are not known.
    """
    stack = stack_window(encoder)
    if stack is None:
        return {}
    windows = encoder.effective_windows()
    names = ['layers'] if len(set(windows)) == 1 else [f'layer_{index:02}' for index in range(len(windows))]
    return {**dict(zip(names, windows)), 'stack': stack}


def audit_pass(record: BatchRecord, encoder, layers: bool = False) -> MaskAudit:
    """Audit a forward pass in its context: ``window`` and ``stack``, or all of :func:`windows_of`."""
    known = {'window': tightest_window_of(encoder), 'stack': stack_window(encoder)}
    windows = windows_of(encoder) if layers else {}
    windows.update((name, window) for name, window in known.items() if window is not None)
    return audit_masks(record.masks, record.mask_lengths, record.factor, windows, record.threshold)


def audit_masks(
    masks: torch.Tensor,
    lengths: torch.Tensor,
    factor: int = 1,
    windows: Mapping[str, Window] | None = None,
    threshold: float = MASK_THRESHOLD,
) -> MaskAudit:
    """Count masked frames, and those without a visible frame in windows; see :func:`windows_of`.

    ``masks`` [B, D, M] or [B, M] are 1 or True where masked, or the share of the features that is; ``lengths`` [B] are
    valid mask frames, of which ``factor`` make an attention frame. It counts as masked above a share of ``threshold``.
    """
    masks = masks.mean(dim=1, dtype=torch.float32) if masks.dim() == 3 else masks
    lengths = lengths.to(masks.device).clamp(max=masks.shape[-1])
    share, frames = masked_share_per_frame(masks, factor), lengths // factor
    masked = (share > threshold) & _before(frames, share)
    windows = windows or {}
    lost = {each: (no_visible_frame(share, each, threshold, frames) & masked).sum() for each in set(windows.values())}
    return MaskAudit(
        mask_frames=lengths.sum(),
        mask_frames_masked=(masks * _before(lengths, masks)).sum(dtype=torch.float64),
        frames=frames.sum(),
        frames_masked=masked.sum(),
        no_visible_frame={name: lost[window] for name, window in windows.items()},
        masked=masked,
    )


def _before(lengths: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return which places of a tensor [B, N] are before the lengths [B]; bool."""
    return torch.arange(like.shape[1], device=like.device) < lengths.unsqueeze(1)


def audit_masking(
    masking: torch.nn.Module,
    lengths: torch.Tensor,
    features: int,
    factor: int = 1,
    windows: Mapping[str, Window] | None = None,
    draws: int = 100,
    seed: int = 0,
) -> MaskAudit:
    """Count what a masking module masks in utterances of D features and lengths [B], in mask frames.

    A module that takes a context gets the tightest of the windows, as in a training step; others mask regardless. It is
    called ``draws`` times with ``input_feats`` [B, D, M] and ``input_lengths`` [B], on the device of the lengths, and
    returns features and masks [B, D, M]. Random generators are left as they were.
    """
    layers = [window for name, window in (windows or {}).items() if name != 'stack']
    arguments = window_of_masking(masking, tightest_window(layers) if layers else None)
    feats = torch.zeros(lengths.shape[0], features, int(lengths.max()), device=lengths.device)
    with isolate_rng(), torch.no_grad():
        torch.manual_seed(seed)
        drawn = [masking(input_feats=feats, input_lengths=lengths, **arguments)[1].mean(dim=1) for _ in range(draws)]
    return audit_masks(torch.cat(drawn), lengths.repeat(draws), factor, windows)
