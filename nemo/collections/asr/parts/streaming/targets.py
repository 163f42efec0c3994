# SPDX-License-Identifier: Apache-2.0
"""The targets of live streams, as they come: each token as soon as all its frames are there.

Where the model standardises its targets (``target_normalize: per_feature``), the statistics of the whole utterance are
not known in a stream. A token gets those of all frames from the stream's beginning up to the token's own last one, so
that it does not depend on how the stream is cut.

Shapes: F features (or the encoder's width), M mask frames, S target frames, H codebooks.
"""

from dataclasses import dataclass

import torch

SMALLEST_STD = 1e-5  # as in NeMo's per_feature normalisation


@dataclass
class TargetStream:
    """The state of one stream of which targets are made."""

    waiting: torch.Tensor
    """Mask frames that do not make a whole target yet, [F, M]."""
    total: torch.Tensor
    """Sum over the frames received, [F] float64."""
    squares: torch.Tensor
    """Sum of their squares, [F] float64."""
    count: int = 0
    """Mask frames received."""


class LiveTargets:
    """Makes the tokens of streams with a model's quantizer; the state is in the :class:`TargetStream` of each.

    Args:
        model: an ``EncDecMaskedTokenPredModel`` or its denoising subclass.
    """

    def __init__(self, model):
        self.model = model
        self.pre_conv = model.pre_encoder is None
        self.combined = getattr(model.quantizer, 'combine_time_steps', 1)

    def new_stream(self, features: int, device) -> TargetStream:
        """The state of a stream before its first frame.

        Args:
            features: F.
            device: where its tensors are.
        """
        sums = torch.zeros(features, dtype=torch.float64, device=device)
        return TargetStream(torch.zeros(features, 0, device=device), sums, sums)

    def make(self, stream: TargetStream, frames: torch.Tensor) -> torch.Tensor | None:
        """Take new mask frames and make the tokens that they complete; the others wait.

        Args:
            stream: its state, which moves on.
            frames: [F, M], as they were received.

        Returns:
            tokens, [S] or [S, H] int64; None if there is none.
        """
        if not frames.shape[1]:
            return None
        first = self.combined - 1 - stream.waiting.shape[1]  # the new frame that completes the first token
        mean, std = _running_statistics(stream, frames, first, self.combined)
        frames = torch.cat((stream.waiting, frames), dim=1)
        whole = frames.shape[1] // self.combined * self.combined
        stream.waiting, frames = frames[:, whole:].clone(), frames[:, :whole]
        if not whole:
            return None
        if self.model.target_normalize == 'per_feature':
            mean, std = (each.repeat_interleave(self.combined, dim=1) for each in (mean, std))
            frames = ((frames.double() - mean) / std).to(frames.dtype)
        projection = getattr(self.model.quantizer, 'proj', None)  # of a model in half precision
        frames = frames if projection is None else frames.to(projection.weight.dtype)
        return self.model.quantizer(input_signal=frames.unsqueeze(0))[1][0]


def _running_statistics(
    stream: TargetStream, frames: torch.Tensor, first: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add new frames [F, M] to a stream's sums; return mean and deviation after frame ``first`` and every stride-th on.

    Both are [F, S] float64.
    """
    frames = frames.double()
    totals = torch.cat((stream.total.unsqueeze(1), frames), dim=1).cumsum(dim=1)[:, 1:]
    squares = torch.cat((stream.squares.unsqueeze(1), frames.square()), dim=1).cumsum(dim=1)[:, 1:]
    counts = torch.arange(stream.count + 1, stream.count + 1 + frames.shape[1], device=frames.device)
    stream.total, stream.squares = totals[:, -1].clone(), squares[:, -1].clone()
    stream.count += frames.shape[1]
    totals, squares, counts = (each[..., first::stride] for each in (totals, squares, counts))
    mean = totals / counts
    variance = (squares - counts * mean.square()).clamp(min=0) / (counts - 1).clamp(min=1)
    return mean, variance.sqrt() + SMALLEST_STD
