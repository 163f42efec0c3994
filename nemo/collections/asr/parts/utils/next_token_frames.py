# SPDX-License-Identifier: Apache-2.0
"""Next tokens decoded from the frames that count alone, one horizon after the other. New in this project.

Shapes: B batch, D the encoder's width, T encoder frames, S target frames, N frames that count, K horizons, C classes,
H codebooks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from nemo.collections.asr.losses.ssl_losses.mlm import IGNORED_TARGET
from nemo.collections.asr.losses.ssl_losses.next_token import NextTokenLoss
from nemo.collections.asr.parts.utils.masked_frames import select_counted


class NextTokenFrames(NamedTuple):
    """Encoder frames, and the tokens that they are asked for; where none counts, one frame with targets of -100."""

    frames: torch.Tensor  # [N, D]
    targets: torch.Tensor  # [N, K] or [N, K, H] int64; -100 where there is no such token
    utterances: torch.Tensor  # [N] int64: index of each frame's utterance in the batch, rising

    def of_horizon(self, horizon: int) -> 'NextTokenFrames':
        """Return the frames that count at a horizon, with targets [N] or [N, H]. Waits for the device; N may be 0."""
        targets = self.targets[:, horizon]
        counted = targets != IGNORED_TARGET
        counted = counted if counted.dim() == 1 else counted.any(dim=1)
        index = counted.nonzero().squeeze(1)  # the one wait; by a mask each of the three would wait
        return NextTokenFrames(*(part.index_select(0, index) for part in (self.frames, targets, self.utterances)))


class HorizonLosses(NamedTuple):
    """What each horizon lost; the gradient goes through ``totals``."""

    totals: torch.Tensor
    """Sum of the negative log-likelihood of the frames that count, [K], float32 or float64."""
    counts: torch.Tensor
    """How many frames these are, [K] int64."""

    @property
    def mean(self) -> torch.Tensor:
        """Nats per pair of frame and horizon, a scalar; 0 where there is none."""
        return self.totals.sum() / self.counts.sum().clamp(min=1)

    def logs(self) -> dict[str, torch.Tensor]:
        """Return each horizon's nats per frame by its name, ``next_0`` and so on, without gradient."""
        means = (self.totals / self.counts.clamp(min=1)).detach()
        return {f'next_{horizon}': mean for horizon, mean in enumerate(means)}


def select_next_token_frames(
    loss: NextTokenLoss, encoded, tokens, offset: int, encoded_lengths, token_lengths, chunk: int = 1
) -> NextTokenFrames:
    """Return the frames with a next token, and those tokens. Waits for the device: for their number.

    A frame near the end of its utterance counts at the first horizons only.

    Args:
        loss: the model's.
        encoded: [B, D, T]; encoded_lengths: its lengths [B].
        tokens: [B, S] or [B, S, H]; token_lengths: their lengths [B].
        offset, chunk: as in :meth:`NextTokenLoss.align`.
    """
    aligned = loss.align(encoded.transpose(1, 2), tokens, offset, encoded_lengths, token_lengths, chunk)
    return NextTokenFrames(*select_counted(*aligned))


def of_horizons(decoders: torch.nn.ModuleList, loss: NextTokenLoss, selected: NextTokenFrames) -> HorizonLosses:
    """Decode and compute the loss of one horizon after the other.

    Log-probabilities of one horizon exist at a time. The backward pass computes them anew: a decoder is a small part
    of the model, its log-probabilities are a large part of a step's memory.

    Args:
        decoders: one for each horizon, that take ``encoder_output`` [1, D, N].
        loss: of the model.
        selected: the frames.
    """

    def of_one(frames, targets, decoder):
        lost, counted = loss.of_horizon(decode(decoder, frames), targets)
        return lost.sum(), counted.sum()

    # Nothing in here is random: the state of the generators need not be kept (on a GPU, that would wait for it).
    pairs = [
        checkpoint(
            of_one,
            selected.frames,
            selected.targets[:, horizon],
            decoder,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for horizon, decoder in enumerate(decoders)
    ]
    return HorizonLosses(*(torch.stack(part) for part in zip(*pairs)))


def decode(decoder: torch.nn.Module, frames: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [N, C] or [N, C, H] of frames [N, D]."""
    return decoder(encoder_output=frames.t().unsqueeze(0)).squeeze(0)


def predictions_of_horizons(
    decoders: torch.nn.ModuleList, selected: NextTokenFrames
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield, horizon by horizon, log-probabilities [N, C] or [N, C, H], targets and utterances of those that count.

    N may be 0, and differs between horizons. Waits for the device.
    """
    for horizon, decoder in enumerate(decoders):
        frames, targets, utterances = selected.of_horizon(horizon)
        yield decode(decoder, frames if len(frames) else selected.frames[:1])[: len(frames)], targets, utterances
