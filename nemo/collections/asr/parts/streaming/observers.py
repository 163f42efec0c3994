# SPDX-License-Identifier: Apache-2.0
"""What watches live streams beside the encoder: masking and its loss, next tokens and their surprise.

Each stream is observed by itself, on the CPU's time: this is for diagnosis.

Shapes: B streams, R rows of them, F features (or the encoder's width), M mask frames, A attention frames, C classes.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from nemo.collections.asr.modules.ssl_modules.masked_time_line import MaskedTimeLine
from nemo.collections.asr.parts.streaming.masking import LiveMasking, MaskedStream
from nemo.collections.asr.parts.streaming.output import StreamingOutput, valid_frames
from nemo.collections.asr.parts.streaming.state import check_like, copy_tensors, tensors_of
from nemo.collections.asr.parts.streaming.surprise import LiveSurprise, SurprisedStream
from nemo.collections.asr.parts.streaming.targets import LiveTargets, TargetStream


@dataclass
class ObservedStream:
    """What is kept of one stream."""

    targets: TargetStream
    masked: MaskedStream | None
    surprised: SurprisedStream | None


class Observers:
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

    def __init__(self, model, context, batch: int, features: int, apply_mask: bool, return_surprise: bool):
        self.masking = LiveMasking(model, context) if apply_mask else None
        self.surprise = LiveSurprise(model, context) if return_surprise else None
        self.targets = LiveTargets(model)
        self.hook = 'on_features' if self.targets.pre_conv else 'on_frames'  # of the batch runner
        self._width = features if self.targets.pre_conv else model.encoder.d_model
        self._device = next(model.encoder.parameters()).device
        self.streams = [self._new() for _ in range(batch)]
        self._masks: list[list] = [[] for _ in range(batch)]  # of this step

    def _new(self) -> ObservedStream:
        return ObservedStream(
            self.targets.new_stream(self._width, self._device),
            None if self.masking is None else self.masking.new_stream(self._device),
            None if self.surprise is None else self.surprise.new_stream(),
        )

    def reset(self, rows: list[int]) -> None:
        """Restart streams."""
        for row in rows:
            self.streams[row] = self._new()

    def export(self, row: int) -> dict:
        """Return a copy of a row: plain containers and tensors."""
        return copy_tensors(_plain(self.streams[row]))

    def check(self, state: dict) -> None:
        """Raise ValueError unless :meth:`load` can take a state."""
        check_like(state, _plain(self._new()), 'observers')

    def load(self, row: int, state: dict) -> None:
        """Replace a row by an exported state, which has been checked."""
        state = copy_tensors(state, self._device)
        if state['masked'] is not None and state['masked']['time_line'] is not None:
            state['masked']['time_line'] = MaskedTimeLine(**state['masked']['time_line'])
        self.streams[row] = ObservedStream(
            TargetStream(**state['targets']),
            None if state['masked'] is None else MaskedStream(**state['masked']),
            None if state['surprised'] is None else SurprisedStream(**state['surprised']),
        )

    def bytes(self) -> int:
        """Return how many bytes is kept."""
        return sum(tensor.nbytes for stream in self.streams for tensor in tensors_of(_plain(stream)))

    def take(self, frames: torch.Tensor, numbers: np.ndarray, valid: np.ndarray) -> torch.Tensor:
        """Take new mask frames [R, M, F], of which ``valid`` are their stream's own; return them as the encoder sees them."""
        seen = frames if self.masking is None else frames.clone()
        for index, (row, count) in enumerate(zip(numbers.tolist(), valid.sum(axis=1).tolist(), strict=True)):
            if count:
                own = frames[index, :count].T
                seen[index, :count] = self._take(self.streams[row], own, self._masks[row]).T
        return seen

    def _take(self, stream: ObservedStream, frames: torch.Tensor, masks: list) -> torch.Tensor:
        """Make the targets of a stream's frames [F, M], and mask them; masks [1, M] go to a list."""
        tokens = self.targets.make(stream.targets, frames)
        if self.surprise is not None:
            self.surprise.take_tokens(stream.surprised, tokens)
        if self.masking is None:
            return frames
        self.masking.take_targets(stream.masked, tokens)
        frames, mask = self.masking.mask(stream.masked, frames)
        masks.append(mask)
        return frames

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
        masks = [torch.cat([mask[0] for mask in of]) if of else output.log_probs.new_zeros(0) for of in self._masks]
        self._masks = [[] for _ in self._masks]
        output.masks, output.mask_lengths = _pad(masks)
        rows = zip(self.streams, output.log_probs, output.lengths.tolist(), strict=True)
        losses = [self.masking.score(stream.masked, log_probs[:length]) for stream, log_probs, length in rows]
        output.masked_frames = sum(frames for _, frames in losses)
        output.loss = sum(total for total, _ in losses) / max(output.masked_frames, 1)

    def _compare(self, output: StreamingOutput) -> None:
        output.next_tokens, log_probs = self.surprise.predict(output.encoded, valid_frames(output))
        output.surprise_start = torch.tensor(
            [stream.surprised.start for stream in self.streams], device=output.lengths.device
        )
        rows = zip(self.streams, log_probs, output.lengths.tolist(), strict=True)
        surprise = [self.surprise.score(stream.surprised, predicted[:length]) for stream, predicted, length in rows]
        output.surprise, output.surprise_lengths = _pad(surprise)


def _plain(value):
    """Return dataclasses as dicts; their tensors are not copied."""
    if not dataclasses.is_dataclass(value):
        return value
    return {name: _plain(each) for name, each in vars(value).items()}


def _pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack tensors [A] of different A; returns [B, A] with zeros at the ends, and the A [B]."""
    stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return stacked, torch.tensor([len(row) for row in rows], device=stacked.device)
