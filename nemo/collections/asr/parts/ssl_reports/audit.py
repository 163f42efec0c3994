# SPDX-License-Identifier: Apache-2.0
"""Masks audited: how much is masked, in runs of what length, and which masked frames have no visible frame.

Shapes: B batch, D features, M mask frames, A attention frames (M // factor), R run lengths from 0 to the longest.

Counts stay on the device of the masks, and nothing synchronises.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.receptive_field import receptive_field
from nemo.collections.asr.parts.att_context.visible_frames import (
    MASK_THRESHOLD,
    masked_share_per_frame,
    no_visible_frame,
    window_of_masking,
)
from nemo.collections.asr.parts.att_context.windows import STYLES, Window, tightest_window
from nemo.collections.asr.parts.objectives.record import BatchRecord
from nemo_streaming_ssl.deprecation import renamed

LAYERS, STACK = 'layers', 'stack'  # names of windows: of all layers alike, and of the whole encoder


@dataclass
class MaskAudit:
    """Counts of one batch, or of several that were added up; int64 tensors on one device.

    A frame is an attention frame that lies whole within its utterance; it is masked if more than the threshold of its
    mask frames is.
    """

    mask_frames: torch.Tensor
    """Mask frames within the utterances."""
    mask_frames_masked: torch.Tensor
    """Those of them that are masked; float64, for a masking may hide some features of a frame and not others."""
    frames: torch.Tensor
    """Attention frames."""
    frames_masked: torch.Tensor
    """Those of them that are masked."""
    no_visible_frame: dict[str, torch.Tensor]
    """For each window, the masked frames that have no visible frame in it: none without any masked mask frame."""
    runs: torch.Tensor
    """[R]: how many runs of so many masked frames there are, one after the other."""
    batches: torch.Tensor
    """Batches counted."""
    empty_batches: torch.Tensor
    """Batches without any masked frame."""

    def __add__(self, other: 'MaskAudit') -> 'MaskAudit':
        """Add up two audits of the same windows."""
        longest = max(self.runs.shape[0], other.runs.shape[0])
        runs = sum(torch.nn.functional.pad(audit.runs, (0, longest - audit.runs.shape[0])) for audit in (self, other))
        no_visible = {name: count + other.no_visible_frame[name] for name, count in self.no_visible_frame.items()}
        names = ('mask_frames', 'mask_frames_masked', 'frames', 'frames_masked', 'batches', 'empty_batches')
        counts = {name: getattr(self, name) + getattr(other, name) for name in names}
        return MaskAudit(runs=runs, no_visible_frame=no_visible, **counts)

    def masked_share(self) -> torch.Tensor:
        """Share of the mask frames that is masked; a scalar."""
        return self.mask_frames_masked / self.mask_frames.clamp(min=1)

    def no_visible_frame_share(self) -> dict[str, torch.Tensor]:
        """For each window, the share of the masked frames that have no visible frame in it; scalars."""
        masked = self.frames_masked.clamp(min=1)
        return {name: count / masked for name, count in self.no_visible_frame.items()}

    unanswerable_share = renamed('MaskAudit.unanswerable_share', no_visible_frame_share)

    def mean_run(self) -> torch.Tensor:
        """Mean length of a run of masked frames, in attention frames; a scalar."""
        return self.frames_masked / self.runs.sum().clamp(min=1)

    def run_quantile(self, share: float) -> torch.Tensor:
        """Return the shortest length that this share of the runs does not exceed, in attention frames; a scalar."""
        up_to = self.runs.cumsum(0)
        return (up_to < share * up_to[-1]).sum()

    def longest_run(self) -> torch.Tensor:
        """Length of the longest run, in attention frames; a scalar."""
        return torch.where(self.runs > 0, torch.arange(self.runs.shape[0], device=self.runs.device), 0).max()

    def logs(self, prefix: str = 'audit/') -> dict[str, torch.Tensor]:
        """Return the scalars to log, on the device of the counts."""
        shares = {f'{prefix}no_visible_frame/{name}': share for name, share in self.no_visible_frame_share().items()}
        runs = {'mean': self.mean_run(), 'p90': self.run_quantile(0.9).float(), 'longest': self.longest_run().float()}
        return {
            f'{prefix}masked_share': self.masked_share(),
            **shares,
            **{f'{prefix}run_frames/{name}': value for name, value in runs.items()},
        }


def layer_windows_of(encoder, att_context_size=None) -> dict[str, Window]:
    """Return what each layer of an encoder attends to.

    Args:
        encoder: any; one without attention contexts, or of a style without windows, has none.
        att_context_size: the batch's context; None takes the encoder's present one.

    Returns:
        ``layers`` where all layers attend alike, else ``layer_00`` and so on.
    """
    style = getattr(encoder, 'att_context_style', None)
    if style not in STYLES or not hasattr(encoder, 'effective_windows'):
        return {}
    windows = encoder.effective_windows(att_context_size)
    names = [LAYERS] if len(set(windows)) == 1 else [f'layer_{index:02}' for index in range(len(windows))]
    return dict(zip(names, windows))


def windows_of(encoder, att_context_size=None) -> dict[str, Window]:
    """Return what each layer of an encoder attends to, and what the whole of it depends on.

    Args:
        encoder, att_context_size: as in :func:`layer_windows_of`.

    Returns:
        the layers' windows; and ``stack``: the receptive field through attention and convolutions of all layers, under
        ``chunked_limited`` that of the frame that sees most. None at all where the layers have none.
    """
    windows = layer_windows_of(encoder, att_context_size)
    if not windows:
        return {}
    field = receptive_field(encoder, att_context_size)
    return {**windows, STACK: Window(AttContext(field.left, field.right))}


def audit_masks(
    masks: torch.Tensor,
    lengths: torch.Tensor,
    factor: int = 1,
    windows: Mapping[str, Window] | None = None,
    threshold: float = MASK_THRESHOLD,
) -> MaskAudit:
    """Count what these masks hide, and the masked frames that have no visible frame.

    Args:
        masks: [B, D, M] or [B, M], 1 or True where masked.
        lengths: valid mask frames of each utterance [B].
        factor: mask frames per attention frame.
        windows: by name; see :func:`windows_of`. Several of one kind are looked at once.
        threshold: share of an attention frame's mask frames above which it counts as masked.
    """
    masks = masks.unsqueeze(1) if masks.dim() == 2 else masks
    lengths = lengths.to(masks.device).clamp(max=masks.shape[-1])
    valid = torch.arange(masks.shape[-1], device=masks.device) < lengths.unsqueeze(1)
    share, in_utterance, masked = _attention_frames(masks, lengths, factor, threshold)
    found = {}
    for window in set((windows or {}).values()):
        found[window] = (no_visible_frame(share, window, threshold, lengths // factor) & masked).sum()
    return MaskAudit(
        mask_frames=lengths.sum(),
        mask_frames_masked=(masks.mean(dim=1, dtype=torch.float32) * valid).sum(dtype=torch.float64),
        frames=in_utterance.sum(),
        frames_masked=masked.sum(),
        no_visible_frame={name: found[window] for name, window in (windows or {}).items()},
        runs=_run_lengths(masked),
        batches=torch.ones((), dtype=torch.int64, device=masks.device),
        empty_batches=(~masked.any()).long(),
    )


def _attention_frames(masks: torch.Tensor, lengths: torch.Tensor, factor: int, threshold: float):
    """Return the masked share of each attention frame [B, A], the complete frames, and the masked ones."""
    share = masked_share_per_frame(masks, factor)
    in_utterance = torch.arange(share.shape[1], device=masks.device) < (lengths // factor).unsqueeze(1)
    return share, in_utterance, (share > threshold) & in_utterance


def _run_lengths(masked: torch.Tensor) -> torch.Tensor:
    """Return how many runs of each length there are in [B, A] bool; [A + 1] int64."""
    frames = masked.shape[1]
    runs = torch.zeros(frames + 1, dtype=torch.int64, device=masked.device)
    if frames == 0:
        return runs
    index = torch.arange(frames, device=masked.device)
    so_far = index - torch.where(masked, -1, index).cummax(dim=1).values  # masked frames up to this one, it included
    ends = masked & ~torch.nn.functional.pad(masked[:, 1:], (0, 1))
    return runs.scatter_add_(0, torch.where(ends, so_far, 0).flatten(), ends.flatten().long())


def audit_masking(
    masking: torch.nn.Module,
    lengths: torch.Tensor,
    features: int,
    factor: int = 1,
    windows: Mapping[str, Window] | None = None,
    draws: int = 100,
    seed: int = 0,
    threshold: float = MASK_THRESHOLD,
) -> MaskAudit:
    """Count what a masking module would hide in utterances of these lengths; torch's generators are left as they were.

    A module that takes a context gets the tightest of the windows, as in a training step; others mask regardless.

    Args:
        masking: a module that is called with ``input_feats`` [B, D, M] and ``input_lengths`` [B], and returns the
            masked features and the masks [B, D, M].
        lengths: mask frames of each utterance [B], on the device to run on.
        features: D.
        factor, windows, threshold: as in :func:`audit_masks`.
        draws: how often the batch is masked.
        seed: of the draws.

    Raises:
        ValueError: if ``draws`` is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}; it must be 1 or more")
    windows = windows or {}
    layers = [window for name, window in windows.items() if name != STACK]
    arguments = window_of_masking(masking, tightest_window(layers) if layers else None)
    feats = torch.zeros(lengths.shape[0], features, int(lengths.max()), device=lengths.device)
    with torch.random.fork_rng(devices=[lengths.device] if lengths.is_cuda else []), torch.no_grad():
        torch.manual_seed(seed)
        masks = [masking(input_feats=feats, input_lengths=lengths, **arguments)[1] for _ in range(draws)]
    audits = [audit_masks(drawn, lengths, factor, windows, threshold) for drawn in masks]
    return sum(audits[1:], audits[0])


class TrainingAudit:
    """Audits training batches at an interval, and counts all along what the loss cannot use. For one rank.

    Args:
        every_n_batches: from one audit to the next; the first batch is audited.
    """

    def __init__(self, every_n_batches: int):
        self.every_n_batches = every_n_batches
        self._batches = 0
        self._empty: torch.Tensor | None = None
        self._without_mask: torch.Tensor | None = None
        self._latest: dict[str, torch.Tensor] = {}

    def step(self, record: BatchRecord, encoder, frame_ms: float | None = None) -> dict[str, torch.Tensor]:
        """Take a training batch in; within its pinned context.

        Args:
            record: of the batch's forward pass.
            encoder: whose windows are audited.
            frame_ms: milliseconds of an attention frame; None: the look-ahead is not reported.

        Returns:
            scalars to log: of the last audited batch, for a logger that logs some steps only, with
            ``audit/look_ahead_ms``, the look-ahead of the whole encoder in its context (-1: all); and the counts
            since training began in this process, ``audit/empty_batches`` (without any masked frame) and
            ``audit/frames_without_mask`` (decoder frames beyond the last whole frame of the masks: left out).
        """
        masks, lengths, factor = record.masks, record.mask_lengths, record.factor
        if self._batches % self.every_n_batches == 0:
            windows = windows_of(encoder)
            audit = audit_masks(masks, lengths, factor, windows, record.threshold)
            self._latest, empty = audit.logs(), audit.empty_batches
            if frame_ms is not None and STACK in windows:
                right = windows[STACK].context.right
                self._latest['audit/look_ahead_ms'] = -1.0 if right == UNLIMITED else right * frame_ms
        else:
            _, _, masked = _attention_frames(masks, lengths.to(masks.device), factor, record.threshold)
            empty = (~masked.any()).long()
        self._batches += 1
        with_masks = torch.div(lengths, factor, rounding_mode='floor')
        dropped = (record.encoded_lengths - record.decoder_offset - with_masks).clamp(min=0)
        self._empty = empty + (0 if self._empty is None else self._empty)
        self._without_mask = dropped.sum() + (0 if self._without_mask is None else self._without_mask)
        counts = {'empty_batches': self._empty, 'frames_without_mask': self._without_mask}
        return {**self._latest, **{f'audit/{name}': count.float() for name, count in counts.items()}}
