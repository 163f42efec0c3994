# SPDX-License-Identifier: Apache-2.0
"""What watches live streams beside the encoder: masking and its loss, next tokens and their surprise.

Each stream is observed by itself, on the CPU's time: this is for diagnosis. Masks and targets do not depend on how a stream is
cut: masking keeps what it drew, and with ``target_normalize: per_feature`` a token gets the statistics of all frames up to
its own last one. Frame j predicts, at the first horizon, token j + offset.

Shapes: B streams, R of them, F features (D, the width, after convolutions), M mask frames, S target frames, A attention
frames, K horizons, C classes, H codebooks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo.collections.asr.modules.ssl_modules.masking import MaskedTimeLine
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.visible_frames import window_of_masking
from nemo.collections.asr.parts.att_context.windows import tightest_window
from nemo.collections.asr.parts.objectives.next_tokens import NextTokens
from nemo.collections.asr.parts.streaming.state import StreamStates
from nemo.collections.asr.parts.streaming.text import decode_frames

SMALLEST_STD = 1e-5  # as in NeMo's per_feature normalisation


@dataclass
class ObservedStream:
    """The state of one stream. Targets and predictions wait for each other; masking and surprise do not."""

    waiting: Tensor  # mask frames that do not make a whole target yet, [F, M]
    sums: Tensor  # of the frames of all targets, and of their squares, [2, F, 1, 1] float64
    count: int = 0  # of these frames
    time_line: MaskedTimeLine | None = None  # what masking has drawn
    masks: Tensor | None = None  # [1, M]
    tokens: Tensor | None = None  # [S] or [S, H]
    log_probs: Tensor | None = None  # after ``decoder_offset``, which the loss drops, [A, C] or [A, C, H]
    start: int = 0  # index of the token whose surprise is the next to be known
    next_tokens: Tensor | None = None  # after ``offset`` earlier ones, [S] or [S, H]
    next_log_probs: Tensor | None = None  # at the first horizon, [A, C] or [A, C, H]


class LiveMasking:
    """Masks streams of a model of masked tokens, and computes their loss; ValueError if unsupported."""

    def __init__(self, model: Any, context: AttContext):
        if not all(hasattr(model, name) for name in ('mask_processor', 'quantizer', 'loss')):
            raise ValueError(f"apply_mask needs a masked token prediction model; {type(model).__name__} is none")
        if not model.objectives.masks:
            raise ValueError(f"apply_mask: model.objective is {model.objective}, which predicts no masked tokens")
        self.masking, self.loss = model.mask_processor, model.loss
        if not hasattr(self.masking, 'new_stream'):
            raise ValueError(f"apply_mask: {type(self.masking).__name__} has no new_stream, so it cannot mask streams")
        self._arguments = window_of_masking(self.masking, tightest_window(model.encoder.effective_windows(context)))

    def mask(self, stream: Any, frames: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take new mask frames [F, M] and tokens; return the encoder's frames, and their masks [M]."""
        stream.tokens = _joined(stream.tokens, tokens)
        counts = [[frames.shape[1]], [stream.count + stream.waiting.shape[1]]]
        lengths, received = torch.tensor(counts, device=frames.device)  # one copy
        new = dict(input_feats=frames[None], input_lengths=lengths, current_frame=received)
        masked, masks = self.masking(**new, stream=stream.time_line, **self._arguments)
        stream.masks = torch.cat((stream.masks, masks[0, :1].to(stream.masks.dtype)), dim=1)
        return masked[0], masks[0, 0]

    def score(self, stream: Any, log_probs: Tensor) -> tuple[Tensor, int]:
        """Take new predictions [A, C] or [A, C, H]; return the summed loss and its number of masked frames."""
        stream.log_probs = log_probs = _joined(stream.log_probs, log_probs)
        if stream.tokens is None or not len(log_probs):
            return log_probs.new_zeros(()), 0
        loss, masks = self.loss, stream.masks.unsqueeze(0)
        aligned, targets, counted = loss.align(log_probs.unsqueeze(0), stream.tokens.unsqueeze(0), masks)
        ready = aligned.shape[1]
        lost = loss.of_frames(aligned[0], targets[0], reduction='none')
        stream.log_probs, stream.tokens = log_probs[ready:].clone(), stream.tokens[ready:].clone()
        stream.masks = stream.masks[:, ready * getattr(loss, 'mlm_loss', loss).combine_time_steps :].clone()
        return lost[counted[0]].sum(), int(counted.sum())


class LiveSurprise:
    """Predicts the next tokens of streams, and scores them; ValueError if the model does not."""

    def __init__(self, model: Any, context: AttContext):
        objectives = getattr(model, 'objectives', None)
        objective = None if objectives is None else objectives.find(NextTokens)
        if objective is None:
            found = f"{type(model).__name__} has {getattr(model, 'objective', 'no objective')}"
            raise ValueError(f"return_surprise needs model.objective next_token or both, and this {found}")
        if objective.at_chunk_end:
            raise ValueError("return_surprise: model.next_token.positions is chunk_end; it must be all")
        combined, needed = getattr(model.quantizer, 'combine_time_steps', 1), model.mask_frames_per_attention_frame
        if combined != needed:
            key = 'model.quantizer.combine_time_steps'
            raise ValueError(f"return_surprise: {key} is {combined}; it must be {needed}, as of the encoder")
        self.offset, self.loss = objective.offset(context), objective.token_loss
        self.decoders = model.next_token_decoders

    def predict(self, encoded: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely next tokens, 0 if not ``valid``, and log-probabilities at horizon 0."""
        predictions = [decode_frames(decoder, encoded) for decoder in self.decoders]
        tokens = torch.stack([log_probs.argmax(dim=2) for log_probs in predictions], dim=2)
        return tokens * valid.view(*valid.shape, *[1] * (tokens.dim() - 2)), predictions[0]

    def score(self, stream: Any, log_probs: Tensor) -> Tensor:
        """Take new predictions [A, C] or [A, C, H]; return nats of all predicted tokens that have come, [S]."""
        log_probs, tokens = _joined(stream.next_log_probs, log_probs), stream.next_tokens
        ready = 0 if tokens is None else max(min(len(log_probs), len(tokens) - self.offset), 0)
        stream.next_log_probs = log_probs[ready:].clone()
        if not ready:
            return log_probs.new_zeros(0)
        stream.next_tokens, stream.start = tokens[ready:].clone(), stream.start + ready
        return self.loss.of_frames(log_probs[:ready], tokens[self.offset :][:ready], reduction='none')


class Observers(StreamStates):
    """Masks streams, predicts and scores their next tokens; ValueError if the model does not."""

    def __init__(self, model: Any, context: AttContext, batch: int, features: int, masks: bool, predicts: bool):
        self.masking = LiveMasking(model, context) if masks else None
        self.surprise = LiveSurprise(model, context) if predicts else None
        self._normalises, self._quantizer = model.target_normalize == 'per_feature', model.quantizer
        self._combined = getattr(model.quantizer, 'combine_time_steps', 1)
        self.pre_conv = model.pre_encoder is None  # whether mask frames are features
        self._width = features if self.pre_conv else model.encoder.d_model
        self._masks: list[list[Tensor]] = [[] for _ in range(batch)]  # of this step
        super().__init__(batch, next(model.encoder.parameters()).device, self._new_stream)

    def _new_stream(self) -> ObservedStream:
        empty = torch.zeros(self._width, 0, device=self.device)
        stream = ObservedStream(empty, empty.new_zeros(2, self._width, 1, 1, dtype=torch.float64))
        if self.masking is not None:
            stream.time_line, stream.masks = self.masking.masking.new_stream(1, self.device), empty[:1]
        if self.surprise is not None:
            stream.start = self.surprise.offset
        return stream

    def take(self, frames: Tensor, numbers: np.ndarray, valid: np.ndarray) -> Tensor:
        """Take mask frames [R, M, F], ``valid`` where they are their stream's; return the encoder's frames."""
        seen = frames if self.masking is None else frames.clone()
        for index, (row, count) in enumerate(zip(numbers.tolist(), valid.sum(axis=1).tolist(), strict=True)):
            if not count:
                continue
            stream, own = self.streams[row], frames[index, :count].T
            tokens = self.tokens(stream, own)
            if self.surprise is not None:
                stream.next_tokens = _joined(stream.next_tokens, tokens)
            if self.masking is not None:
                masked, mask = self.masking.mask(stream, own, tokens)
                self._masks[row].append(mask)
                seen[index, :count] = masked.T
        return seen

    def tokens(self, stream: ObservedStream, frames: Tensor) -> Tensor | None:
        """Return the targets [S] or [S, H] that new mask frames [F, M] complete; None if there is none."""
        frames = torch.cat((stream.waiting.to(frames.dtype), frames), dim=1)
        whole = frames.shape[1] // self._combined * self._combined
        stream.waiting, frames = frames[:, whole:].float().clone(), frames[:, :whole]
        if not whole:
            return None
        if self._normalises:
            frames = _normalised(stream, frames.unflatten(1, (-1, self._combined))).flatten(1)
        stream.count += whole
        projection = getattr(self._quantizer, 'proj', None)  # of a model in half precision
        frames = frames if projection is None else frames.to(projection.weight.dtype)
        return self._quantizer(input_signal=frames.unsqueeze(0))[1][0]

    def finish(self, output: Any, valid: Tensor, failed: list[int]) -> None:
        """Fill in what a step's ``valid`` [B, A] frames complete; ``failed`` streams complete nothing."""
        self.reset(failed)
        for row in failed:
            self._masks[row].clear()
        lengths = output.lengths.tolist()
        if self.masking is not None:
            nothing = output.encoded.new_zeros(0)
            output.masks, output.mask_lengths = _pad([torch.cat(masks or [nothing]) for masks in self._masks])
            self._masks = [[] for _ in lengths]
            rows = zip(self.streams, output.log_probs, lengths, strict=True)
            losses = [self.masking.score(stream, log_probs[:length]) for stream, log_probs, length in rows]
            output.masked_frames = sum(frames for _, frames in losses)
            output.loss = sum(total for total, _ in losses) / max(output.masked_frames, 1)
        if self.surprise is not None:
            output.next_tokens, predicted = self.surprise.predict(output.encoded, valid)
            starts = [stream.start for stream in self.streams]
            output.surprise_start = torch.tensor(starts, device=output.lengths.device)
            rows = zip(self.streams, predicted, lengths, strict=True)
            surprise = [self.surprise.score(stream, each[:length]) for stream, each, length in rows]
            output.surprise, output.surprise_lengths = _pad(surprise)


def _normalised(stream: ObservedStream, frames: Tensor) -> Tensor:
    """Normalise the frames of S targets, [F, S, M], by the statistics of all frames up to each target."""
    own, (_, targets, size) = frames.double(), frames.shape
    sums = torch.stack((own, own.square())).sum(dim=3, keepdim=True).cumsum(dim=2) + stream.sums
    counts = stream.count + size * torch.arange(1, targets + 1, device=frames.device).unsqueeze(1)
    stream.sums = sums[:, :, -1:].clone()
    mean = sums[0] / counts
    variance = (sums[1] - counts * mean.square()).clamp(min=0) / (counts - 1).clamp(min=1)
    return ((own - mean) / (variance.sqrt() + SMALLEST_STD)).to(frames.dtype)


def _joined(earlier: Tensor | None, new: Tensor | None) -> Any:
    """Join what waits with what is new along the first dimension; None is nothing."""
    if earlier is None or new is None:
        return new if earlier is None else earlier
    return torch.cat((earlier, new))


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack tensors [A] of different A; returns [B, A] with zeros at the ends, and the A [B]."""
    stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return stacked, torch.tensor([len(row) for row in rows], device=stacked.device)
