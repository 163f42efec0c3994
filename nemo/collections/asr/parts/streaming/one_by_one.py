# SPDX-License-Identifier: Apache-2.0
"""Live streams one by one through NeMo's own layers: for what the batched way does not know, and to check it by.

Streams that agree in what is new run in one call; masks, targets and what was predicted belong to each stream by itself.
Several sessions of a model may take turns, but not run at once: a call tells the layers what not to remember.

Shapes: B streams, N samples, F features, T feature frames, M mask frames, D the encoder's width, A attention frames.
"""

from collections.abc import Callable

import torch

from nemo.collections.asr.parts.streaming.encoder import StreamingEncoder
from nemo.collections.asr.parts.streaming.features import StreamingFeatures
from nemo.collections.asr.parts.streaming.masking import LiveMasking, StepLoss
from nemo.collections.asr.parts.streaming.output import StreamingOutput, valid_frames
from nemo.collections.asr.parts.streaming.state import VERSION, StreamState
from nemo.collections.asr.parts.streaming.surprise import LiveSurprise
from nemo.collections.asr.parts.streaming.targets import LiveTargets

PIECE = 64  # attention frames of samples that are worked on at once, however many come


class OneByOne:
    """Runs a batch of streams, and keeps their state.

    Args:
        front_end: of the preprocessor.
        encoder: of the encoder, in one context.
        batch: B.
        masking, surprise, targets: what masks the streams, predicts their tokens, and makes these; or None.
    """

    def __init__(
        self,
        front_end: StreamingFeatures,
        encoder: StreamingEncoder,
        batch: int,
        masking: LiveMasking | None,
        surprise: LiveSurprise | None,
        targets: LiveTargets | None,
    ):
        self._front_end, self._encoder, self.batch = front_end, encoder, batch
        self._masking, self._surprise, self._targets = masking, surprise, targets
        self.reset()

    def reset(self) -> None:
        """Begin all streams anew."""
        self._tails = [self._front_end.new_tail() for _ in range(self.batch)]
        self._encoded = self._encoder.new_state(self.batch, self._front_end.features)
        self._masked, self._targeted, self._surprised = ([None] * self.batch for _ in range(3))
        for row in range(self.batch):
            self._forget_targets(row)

    def forget(self, rows: list[int]) -> None:
        """Begin some streams anew."""
        for row in rows:
            self._tails[row] = self._front_end.new_tail()
            self._forget_targets(row)
            self._encoder.forget(self._encoded, row)

    def received(self, encoder_frames: bool, ended) -> torch.Tensor:
        """Return how many feature frames, or encoder frames, each stream has received, [B] int64."""
        return torch.tensor(
            self._encoded.frames if encoder_frames else self._encoded.received, device=self._encoder.device
        )

    def state(self, ended: list[bool]) -> StreamState:
        """Return all state; it is not copied."""
        return StreamState(ended, self._tails, self._encoded, self._masked, self._targeted, self._surprised)

    def load(self, state: dict) -> list[bool]:
        """Take a saved state; returns which of its streams have ended.

        Raises:
            ValueError: if the batched way saved it.
        """
        if state.get('version', 1) > VERSION:
            raise ValueError("load_state_dict: the state was saved by a fast session, and this one is not fast")
        restored = StreamState.from_dict(state, self._masking, self._encoder.device)
        self._tails, self._encoded, self._masked = restored.tails, restored.encoder, restored.masked
        self._targeted, self._surprised = restored.targets, restored.surprised
        return restored.ended

    def _forget_targets(self, row: int) -> None:
        """Begin a stream anew for those that make its targets, mask it or predict them."""
        device = self._encoder.device
        if self._targets is not None:
            width = self._front_end.features if self._targets.pre_conv else self._encoder.encoder.d_model
            self._targeted[row] = self._targets.new_stream(width, device)
        if self._masking is not None:
            self._masked[row] = self._masking.new_stream(device)
        if self._surprise is not None:
            self._surprised[row] = self._surprise.new_stream()

    def advance(
        self, samples, lengths: list[int], ends: list[bool], keep_features: bool, finish: Callable
    ) -> StreamingOutput:
        """Work through samples [B, N] in pieces, so that memory stays bounded however many there are.

        Args:
            samples: on the model's device.
            lengths: how many of each row belong to its stream.
            ends: which streams end with them.
            keep_features: whether to give out the features.
            finish: a function of each piece's output that fills in what the session is to give out.
        """
        piece = PIECE * self._front_end.hop * self._encoder.factor
        count = max(-(-max(lengths) // piece), 1)
        outputs = []
        for index in range(count):
            last = index == count - 1
            pieces = [samples[row, : lengths[row]][index * piece : (index + 1) * piece] for row in range(len(ends))]
            outputs.append(self._advance_by(pieces, [last and end for end in ends], keep_features, finish))
        return StreamingOutput.concatenate(outputs)

    def _advance_by(self, pieces: list[torch.Tensor], ends: list[bool], keep_features, finish) -> StreamingOutput:
        features = self._front_end.step(self._tails, pieces, ends)
        masks = [feature[:0, :0] for feature in features]
        seen, replace = features, None
        if self._targets is not None and self._targets.pre_conv:
            seen = [self._take_mask_frames(row, frames, masks) for row, frames in enumerate(features)]
        elif self._targets is not None:

            def replace(rows, frames):
                return torch.stack([self._take_mask_frames(row, x.T, masks).T for row, x in zip(rows, frames)])

        seen = [frames.to(self._encoder.dtype) for frames in seen]
        encoded = self._encoder.step(self._encoded, seen, ends, replace)
        stacked, lengths = _pad(encoded)
        output = StreamingOutput(stacked, lengths, None)
        if keep_features:
            output.features, output.feature_lengths = _pad(features)
        if self._masking is not None:
            masks, output.mask_lengths = _pad([mask if mask.numel() else mask.new_zeros(1, 0) for mask in masks])
            output.masks = masks[:, 0]
        finish(output)
        if self._masking is not None:
            self._score(output)
        if self._surprise is not None:
            self._compare(output)
        return output

    def _take_mask_frames(self, row: int, frames: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        """Take a stream's new mask frames [F, M]: make their targets, and return them as the encoder is to see them.

        What of them is masked goes to ``masks[row]``.
        """
        tokens = self._targets.make(self._targeted[row], frames)
        if self._surprise is not None:
            self._surprise.take_tokens(self._surprised[row], tokens)
        if self._masking is None:
            return frames
        self._masking.take_targets(self._masked[row], tokens)
        seen, masks[row] = self._masking.mask(self._masked[row], frames)
        return seen

    def _score(self, output: StreamingOutput) -> None:
        losses = [
            self._masking.score(stream, log_probs[:length])
            for stream, log_probs, length in zip(self._masked, output.log_probs, output.lengths.tolist())
        ]
        step = StepLoss(sum(loss.total for loss in losses), sum(loss.frames for loss in losses))
        output.loss, output.masked_frames = step.mean, step.frames

    def _compare(self, output: StreamingOutput) -> None:
        """Predict the next tokens, and compare those that have come with what was predicted of them."""
        output.next_tokens, log_probs = self._surprise.predict(output.encoded, valid_frames(output))
        start = [stream.start for stream in self._surprised]
        output.surprise_start = torch.tensor(start, device=output.lengths.device)
        surprise = [
            self._surprise.score(stream, predicted[:length])
            for stream, predicted, length in zip(self._surprised, log_probs, output.lengths.tolist())
        ]
        stacked, output.surprise_lengths = _pad([row.unsqueeze(0) for row in surprise])
        output.surprise = stacked[:, 0]


def _pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack tensors [D, A] of different A; returns [B, D, A] with zeros at the ends, and the A [B]."""
    lengths = [row.shape[1] for row in rows]
    longest = max(lengths)
    stacked = torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows])
    return stacked, torch.tensor(lengths, device=stacked.device)
