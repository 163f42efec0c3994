# SPDX-License-Identifier: Apache-2.0
"""Loss by distance from the nearest visible frame; of next tokens, from the last frame seen.

Shapes: B batch, A attention frames, S target frames.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch

from nemo.collections.asr.parts.att_context.visible_frames import masked_share_per_frame
from nemo.collections.asr.parts.objectives.base import BatchInputs

FARTHEST = 10  # attention frames; greater distances count as this one
NONE = 0  # as a distance: there is no visible frame on this side


class Distance(NamedTuple):
    """What loss positions are grouped by."""

    part: str
    """``masked``, or ``next`` for next tokens."""
    left: int
    """Frames from the nearest visible frame on the left; of a next token: tokens from the last frame in the context."""
    right: int
    """Frames to the nearest visible frame on the right."""


def distances(visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distance of each frame to the nearest visible frame on either side, [B, A] int64 each.

    Args:
        visible: [B, A] bool.
    """
    return _from_left(visible), _from_left(visible.flip(1)).flip(1)


def _from_left(visible: torch.Tensor) -> torch.Tensor:
    frame = torch.arange(visible.shape[1]).expand_as(visible)
    last = torch.where(visible, frame, -FARTHEST * visible.shape[1]).cummax(dim=1).values
    last = torch.cat((torch.full_like(last[:, :1], -FARTHEST * visible.shape[1]), last[:, :-1]), dim=1)  # before it
    return torch.where(last < 0, NONE, (frame - last).clamp(max=FARTHEST))


@torch.no_grad()
def masked_losses(model, record) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return nats, token, left and right distance of each loss position of masked prediction, [N] each.

    Args:
        model: with one codebook.
        record: of a forward pass, within its context.
    """
    log_probs = model.decoder(encoder_output=record.encoded)[:, record.decoder_offset :]
    share, tokens = masked_share_per_frame(record.masks, record.factor), record.tokens
    log_probs, tokens = (each.flatten(3).squeeze(3) if each.dim() == 4 else each for each in (log_probs, tokens))
    tokens = tokens[..., 0] if tokens.dim() == 3 else tokens
    frames = min(log_probs.shape[1], share.shape[1], tokens.shape[1])
    inside = torch.arange(frames) < torch.minimum(
        record.token_lengths, record.encoded_lengths - record.decoder_offset
    ).unsqueeze(1)
    where = (share[:, :frames] > record.threshold) & inside
    left, right = distances((share[:, :frames] == 0) & inside)
    nats = -log_probs[:, :frames].gather(2, tokens[:, :frames, None]).squeeze(2)
    return nats[where], tokens[:, :frames][where], left[where], right[where]


@torch.no_grad()
def loss_by_distance(model, batches: Iterable[tuple], context, draws: int = 4) -> dict[Distance, tuple[int, float]]:
    """Return the number of loss positions at each distance, and their mean nats below the unigram entropy.

    Args:
        model: in eval mode.
        batches: features [B, D, T] and lengths [B].
        context: the attention context.
        draws: of masks.
    """
    found = defaultdict(list)
    with model.encoder.using_att_context_size(context):
        for index, batch in enumerate(batches):
            for draw in range(draws if model.objectives.masks else 1):
                torch.manual_seed(1000 * index + draw)
                record = model.encode(BatchInputs(batch, batch), model.masking_in_context())
                if model.objectives.masks:
                    nats, tokens, left, right = masked_losses(model, record)
                    for row in zip(left.tolist(), right.tolist(), nats.tolist(), tokens.tolist()):
                        found[Distance('masked', *row[:2])].append(row[2:])
                for scores in model.objectives.scores(record).values():
                    for part in (part for part in scores if part.startswith('next_')):
                        nats, tokens = scores[part].negative_log_likelihood, scores[part].targets.flatten()
                        rows = zip(nats.tolist(), tokens.tolist())
                        found[Distance('next', int(part.removeprefix('next_')) + 1, NONE)] += rows
    return {**_below_unigram(found, 'masked'), **_below_unigram(found, 'next')}


def _below_unigram(found: dict[Distance, list], part: str) -> dict[Distance, tuple[int, float]]:
    """Return the number of frames at each distance, and their mean nats below those of the unigram."""
    own = {distance: rows for distance, rows in found.items() if distance.part == part and rows}
    tokens = torch.tensor([token for rows in own.values() for _, token in rows], dtype=torch.int64)
    if not len(tokens):
        return {}
    unigram = -(torch.bincount(tokens) / len(tokens)).log()
    below = {distance: [unigram[token].item() - nats for nats, token in rows] for distance, rows in own.items()}
    return {distance: (len(values), sum(values) / len(values)) for distance, values in below.items()}
