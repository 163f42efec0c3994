# SPDX-License-Identifier: Apache-2.0
"""What watches live streams beside the encoder: masking and its loss, next tokens and their surprise.

Each stream is observed by itself, on the CPU's time: this is for diagnosis.

Where the model standardises its targets (``target_normalize: per_feature``), a token gets the statistics of all frames from
the stream's beginning up to the token's own last one, so that it does not depend on how the stream is cut.

Shapes: B streams, R rows of them, F features (or the encoder's width), M mask frames, S target frames, A attention frames,
H codebooks.
"""

from dataclasses import dataclass

import numpy as np
import torch

from nemo.collections.asr.parts.streaming.masking import LiveMasking, MaskedStream
from nemo.collections.asr.parts.streaming.output import StreamingOutput, valid_frames
from nemo.collections.asr.parts.streaming.state import StreamStates, joined
from nemo.collections.asr.parts.streaming.surprise import LiveSurprise, SurprisedStream

SMALLEST_STD = 1e-5  # as in NeMo's per_feature normalisation


@dataclass
class ObservedStream:
    """The state of one stream."""

    waiting: torch.Tensor
    """Mask frames that do not make a whole target yet, [F, M]."""
    total: torch.Tensor
    """Sum over the frames received, [F] float64."""
    squares: torch.Tensor
    """Sum of their squares, [F] float64."""
    count: int
    """Mask frames received."""
    masked: MaskedStream | None
    surprised: SurprisedStream | None


class Observers(StreamStates):
    """Masks streams, predicts their next tokens, and compares the tokens that come with what was predicted.

    Args:
        model: of masked or next-token prediction.
        context: the attention context of the streams.
        batch: B.
        features: of the preprocessor.
        apply_mask, return_surprise: what to do.

    Raises:
        ValueError: if the model cannot do what is wanted, with the reason.
    """

    name = 'observers'

    def __init__(self, model, context, batch: int, features: int, apply_mask: bool, return_surprise: bool):
        self.masking = LiveMasking(model, context) if apply_mask else None
        self.surprise = LiveSurprise(model, context) if return_surprise else None
        self._normalises, self._quantizer = model.target_normalize == 'per_feature', model.quantizer
        self._combined = getattr(model.quantizer, 'combine_time_steps', 1)
        self.hook = 'on_features' if model.pre_encoder is None else 'on_frames'  # of the batch runner
        self._width = features if model.pre_encoder is None else model.encoder.d_model
        self._masks: list[list] = [[] for _ in range(batch)]  # of this step
        super().__init__(batch, next(model.encoder.parameters()).device)

    def new_stream(self) -> ObservedStream:
        """Return the state before the first frame."""
        sums = torch.zeros(self._width, dtype=torch.float64, device=self.device)
        masked = None if self.masking is None else self.masking.new_stream(self.device)
        surprised = None if self.surprise is None else self.surprise.new_stream()
        waiting = torch.zeros(self._width, 0, device=self.device)
        return ObservedStream(waiting, sums, sums, 0, masked, surprised)

    def take(self, frames: torch.Tensor, numbers: np.ndarray, valid: np.ndarray) -> torch.Tensor:
        """Take new mask frames [R, M, F], of which ``valid`` are their stream's own; return them as the encoder sees them."""
        seen = frames if self.masking is None else frames.clone()
        for index, (row, count) in enumerate(zip(numbers.tolist(), valid.sum(axis=1).tolist(), strict=True)):
            if not count:
                continue
            stream, own = self.streams[row], frames[index, :count].T
            tokens = self.tokens(stream, own)
            if self.surprise is not None and tokens is not None:
                self.surprise.take_tokens(stream.surprised, tokens)
            if self.masking is not None:
                stream.masked.tokens = joined(stream.masked.tokens, tokens)
                masked, mask = self.masking.mask(stream.masked, own)
                self._masks[row].append(mask[0])
                seen[index, :count] = masked.T
        return seen

    def tokens(self, stream: ObservedStream, frames: torch.Tensor) -> torch.Tensor | None:
        """Return the targets [S] or [S, H] that new mask frames [F, M] complete; None if there is none."""
        first = self._combined - 1 - stream.waiting.shape[1]  # the new frame that completes the first token
        mean, std = _running_statistics(stream, frames, first, self._combined)
        frames = torch.cat((stream.waiting.to(frames.dtype), frames), dim=1)
        whole = frames.shape[1] // self._combined * self._combined
        stream.waiting, frames = frames[:, whole:].float().clone(), frames[:, :whole]
        if not whole:
            return None
        if self._normalises:
            mean, std = (each.repeat_interleave(self._combined, dim=1) for each in (mean, std))
            frames = ((frames.double() - mean) / std).to(frames.dtype)
        projection = getattr(self._quantizer, 'proj', None)  # of a model in half precision
        frames = frames if projection is None else frames.to(projection.weight.dtype)
        return self._quantizer(input_signal=frames.unsqueeze(0))[1][0]

    def finish(self, output: StreamingOutput, failed: list[int]) -> None:
        """Fill in what a step's frames and log-probabilities complete; ``failed`` streams complete nothing."""
        self.reset(failed)
        for row in failed:
            self._masks[row] = []
        if self.masking is not None:
            self._score(output)
        if self.surprise is not None:
            self._compare(output)

    def _score(self, output: StreamingOutput) -> None:
        masks = [torch.cat(of) if of else output.log_probs.new_zeros(0) for of in self._masks]
        self._masks = [[] for _ in self._masks]
        output.masks, output.mask_lengths = _pad(masks)
        rows = zip(self.streams, output.log_probs, output.lengths.tolist(), strict=True)
        losses = [self.masking.score(stream.masked, log_probs[:length]) for stream, log_probs, length in rows]
        output.masked_frames = sum(frames for _, frames in losses)
        output.loss = sum(total for total, _ in losses) / max(output.masked_frames, 1)

    def _compare(self, output: StreamingOutput) -> None:
        output.next_tokens, log_probs = self.surprise.predict(output.encoded, valid_frames(output))
        starts = [stream.surprised.start for stream in self.streams]
        output.surprise_start = torch.tensor(starts, device=output.lengths.device)
        rows = zip(self.streams, log_probs, output.lengths.tolist(), strict=True)
        surprise = [self.surprise.score(stream.surprised, predicted[:length]) for stream, predicted, length in rows]
        output.surprise, output.surprise_lengths = _pad(surprise)


def _running_statistics(stream: ObservedStream, frames: torch.Tensor, first: int, stride: int) -> list[torch.Tensor]:
    """Add new frames to a stream's sums; return mean and deviation, [F, S] float64.

    They are those after frame ``first`` and every stride-th on.
    """
    frames = frames.double()
    sums = torch.stack((stream.total, stream.squares))[:, :, None]
    sums = torch.cat((sums, torch.stack((frames, frames.square()))), dim=2).cumsum(dim=2)[:, :, 1:]
    stream.total, stream.squares = sums[:, :, -1].clone()
    counts = torch.arange(stream.count + 1, stream.count + 1 + frames.shape[1], device=frames.device)[first::stride]
    stream.count += frames.shape[1]
    totals, squares = sums[:, :, first::stride]
    mean = totals / counts
    variance = (squares - counts * mean.square()).clamp(min=0) / (counts - 1).clamp(min=1)
    return [mean, variance.sqrt() + SMALLEST_STD]


def _pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack tensors [A] of different A; returns [B, A] with zeros at the ends, and the A [B]."""
    stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return stacked, torch.tensor([len(row) for row in rows], device=stacked.device)
