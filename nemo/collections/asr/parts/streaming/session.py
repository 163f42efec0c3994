# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Live streaming from raw samples, equal to offline.

    session = StreamingSession(model, att_context_size=[40, 0], return_log_probs=True)
    for samples in microphone:                          # [1, n], any n
        output = session.step(samples)                  # output.encoded [1, D, frames], usually 0 or 1 frames
    output = session.finish()

Shapes: B streams, N samples, F features, T feature frames, M mask frames, D the encoder's width, A attention frames,
S target frames, K horizons, C classes, H codebooks.
"""

from dataclasses import dataclass
from typing import Optional, Sequence

import torch

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.streaming.decoding import decode_frames, decoder_of
from nemo.collections.asr.parts.streaming.encoder import StreamingEncoder
from nemo.collections.asr.parts.streaming.features import StreamingFeatures
from nemo.collections.asr.parts.streaming.masking import LiveMasking, StepLoss
from nemo.collections.asr.parts.streaming.state import StreamState, copy_tensors
from nemo.collections.asr.parts.streaming.surprise import LiveSurprise
from nemo.collections.asr.parts.streaming.targets import LiveTargets

PIECE = 64  # attention frames of samples that are worked on at once, however many come


@dataclass
class StreamingOutput:
    """What one step gave out. Frames at or beyond a stream's length are 0."""

    encoded: torch.Tensor
    """Encoder frames, [B, D, A]."""
    lengths: torch.Tensor
    """How many of them each stream has, [B] int64."""
    current_frame: torch.Tensor
    """Mask frames received by each stream since its beginning, [B] int64: feature frames, or attention frames for a
    model that masks after its convolutions."""
    log_probs: Optional[torch.Tensor] = None
    """With ``return_log_probs``: [B, A, C] or [B, A, C, H], as the model's decoder gives them."""
    tokens: Optional[torch.Tensor] = None
    """With ``return_tokens``: the likeliest class of each frame, [B, A] or [B, A, H] int64; for a CTC model the greedy
    path, blanks and repetitions included."""
    features: Optional[torch.Tensor] = None
    """With ``return_features``: new feature frames, before masking, [B, F, T]."""
    feature_lengths: Optional[torch.Tensor] = None
    """How many of them each stream has, [B] int64."""
    masks: Optional[torch.Tensor] = None
    """With ``apply_mask``: which of the new mask frames are masked, [B, M], 1 where masked."""
    mask_lengths: Optional[torch.Tensor] = None
    """How many mask frames are new in each stream, [B] int64."""
    loss: Optional[torch.Tensor] = None
    """With ``apply_mask``: nats per masked frame, over the frames whose target and prediction this step completed."""
    masked_frames: int = 0
    """With ``apply_mask``: how many frames that is."""
    next_tokens: Optional[torch.Tensor] = None
    """With ``return_surprise``: the likeliest token of each horizon for each new frame, [B, A, K] or [B, A, K, H]
    int64. Frame j predicts at horizon k token j + ``session.next_token_offset`` + k."""
    surprise: Optional[torch.Tensor] = None
    """With ``return_surprise``: nats (the mean over the codebooks) of each token that was predicted at the first horizon
    and is known since this step, [B, S]."""
    surprise_lengths: Optional[torch.Tensor] = None
    """How many of these each stream has, [B] int64."""
    surprise_start: Optional[torch.Tensor] = None
    """Which token of its stream the first of these is, from 0, or will be if there is none yet, [B] int64."""

    @classmethod
    def concatenate(cls, outputs: Sequence['StreamingOutput']) -> 'StreamingOutput':
        """Join outputs of consecutive steps, stream by stream; ``loss`` becomes that of all masked frames.

        Raises:
            ValueError: if there is none.
        """
        if not outputs:
            raise ValueError("concatenate: there is no output to join")
        if len(outputs) == 1:
            return outputs[0]
        lengths = [output.lengths for output in outputs]
        joined = dict(lengths=sum(lengths), current_frame=outputs[-1].current_frame)
        joined['surprise_start'] = outputs[0].surprise_start
        for name, dim, counts in (
            ('encoded', 2, 'lengths'),
            ('log_probs', 1, 'lengths'),
            ('tokens', 1, 'lengths'),
            ('features', 2, 'feature_lengths'),
            ('masks', 1, 'mask_lengths'),
            ('next_tokens', 1, 'lengths'),
            ('surprise', 1, 'surprise_lengths'),
        ):
            if getattr(outputs[0], name) is not None:
                sizes = [getattr(output, counts) for output in outputs]
                joined[name] = _join([getattr(output, name) for output in outputs], sizes, dim)
                joined[counts] = sum(sizes)
        if outputs[0].loss is not None:
            joined['masked_frames'] = sum(output.masked_frames for output in outputs)
            total = sum(output.loss * output.masked_frames for output in outputs)
            joined['loss'] = total / max(joined['masked_frames'], 1)
        return cls(**joined)


class StreamingSession:
    """A batch of live streams through a model, in one attention context. All state is here, none in the model.

    Fed in any pieces, the joined output equals the offline forward of the same samples. Sessions may take turns on one
    model, but not in several threads at once. The model must be in eval mode.

    Args:
        model: with ``preprocessor`` and ``encoder`` (an SSL model, a CTC model), or the two as a pair.
        batch_size: B.
        att_context_size: the context, anything that ``AttContext.parse`` reads; None takes the encoder's default. The
            layers' own contexts narrow it; they must not be changed while the session is in use.
        return_log_probs: whether to run the model's decoder.
        return_tokens: whether to give its likeliest classes.
        return_features: whether to give the features.
        apply_mask: whether to mask, to watch the loss of an SSL model live; see ``LiveMasking``. Draws from torch's
            generator.
        return_surprise: whether to predict the next tokens, and to say of each token, once it is there, how surprising
            it was; for a model whose objective predicts next tokens, see ``LiveSurprise``. With ``apply_mask`` they
            are predicted from the masked stream, as ``model.objective: both`` trains it.

    Raises:
        ValueError: if the model's configuration cannot stream, with the reason, or lacks what is asked for.
    """

    def __init__(
        self,
        model,
        batch_size: int = 1,
        att_context_size=None,
        return_log_probs: bool = False,
        return_tokens: bool = False,
        return_features: bool = False,
        apply_mask: bool = False,
        return_surprise: bool = False,
    ):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be 1 stream or more")
        preprocessor, encoder = _parts(model)
        self.batch_size = batch_size
        self._model, self._modules = model, (preprocessor, encoder)
        self._check_eval_mode()
        default = getattr(encoder, 'att_context_size', None) if att_context_size is None else att_context_size
        self.att_context = AttContext.parse(default)
        self._front_end = StreamingFeatures(preprocessor)
        self._encoder = StreamingEncoder(encoder, self.att_context)
        self._masking = LiveMasking(model, self.att_context) if apply_mask else None
        self._surprise = LiveSurprise(model, self.att_context) if return_surprise else None
        self._targets = LiveTargets(model) if apply_mask or return_surprise else None
        self.return_log_probs, self.return_tokens = return_log_probs, return_tokens
        self.return_features = return_features
        self._decoder = decoder_of(model) if return_log_probs or return_tokens or apply_mask else None
        self.reset()

    @property
    def sample_rate(self) -> int:
        """Samples per second of each stream."""
        return self._front_end.sample_rate

    @property
    def frame_samples(self) -> int:
        """Samples of an attention frame."""
        return self._front_end.hop * self._encoder.factor

    @property
    def look_ahead_samples(self) -> int:
        """Samples after the first one of an attention frame that its output waits for, at most.

        Attention frame i begins with the centre of feature frame factor * i: half a window, and the right context of
        the attention (in ``regular`` style of all layers together).
        """
        return self._front_end.look_ahead + self._encoder.look_ahead * self.frame_samples

    @property
    def next_token_offset(self) -> Optional[int]:
        """How many tokens after its own a frame predicts at the first horizon; None without ``return_surprise``."""
        return None if self._surprise is None else self._surprise.offset

    @property
    def cache_bytes_per_stream(self) -> int:
        """Bytes of state now, per stream; they grow only where the left context is unlimited."""
        return self._state().bytes() // self.batch_size

    @property
    def current_frame(self) -> torch.Tensor:
        """Mask frames received so far by each stream, [B] int64; see ``StreamingOutput.current_frame``."""
        masks_frames = getattr(self._model, 'pre_encoder', None) is not None
        received = self._encoded.frames if masks_frames else self._encoded.received
        return torch.tensor(received, device=self._encoder.device)

    @property
    def ended(self) -> tuple[bool, ...]:
        """For each stream, whether it has ended."""
        return tuple(self._ended)

    def reset(self, streams: Optional[Sequence[int]] = None) -> None:
        """Begin anew; all streams, or those with these indices while the others go on.

        Raises:
            ValueError: if an index is out of range.
        """
        if streams is None:
            self._ended = [False] * self.batch_size
            self._tails = [self._front_end.new_tail() for _ in range(self.batch_size)]
            self._encoded = self._encoder.new_state(self.batch_size, self._front_end.features)
            self._masked, self._targeted, self._surprised = ([None] * self.batch_size for _ in range(3))
            for row in range(self.batch_size):
                self._forget_targets(row)
            return
        for row in streams:
            if not 0 <= row < self.batch_size:
                raise ValueError(f"reset: there is no stream {row}; the session has {self.batch_size}")
            self._ended[row], self._tails[row] = False, self._front_end.new_tail()
            self._forget_targets(row)
            self._encoder.forget(self._encoded, row)

    def step(self, samples, lengths=None, ended=None) -> StreamingOutput:
        """Take samples and give out all frames that they complete.

        Args:
            samples: [B, N] floating point, any N; full scale is 1. Rows of streams that have ended are not read.
            lengths: how many samples of each row belong to its stream, [B]; None: all N.
            ended: for each stream, whether it ends with these samples, [B] bool; None: none does.

        Raises:
            ValueError: if the samples have another shape or dtype or are not finite, or a stream is fed after its end.
        """
        self._check_eval_mode()
        samples = self._checked(samples)
        lengths = self._checked_lengths(lengths, samples.shape[1])
        ends = self._checked_ends(ended)
        for row, length in enumerate(lengths):
            if length and not bool(torch.isfinite(samples[row, :length]).all()):
                raise ValueError(f"samples of stream {row} hold NaN or infinite values")
        return self._advance(samples, lengths, ends)

    def finish(self) -> StreamingOutput:
        """End all streams and give out what is left of them, as the offline forward would see it.

        Raises:
            ValueError: if all of them have ended already.
        """
        self._check_eval_mode()
        if all(self._ended):
            raise ValueError("finish: every stream has ended already; reset() begins anew")
        nothing = torch.zeros(self.batch_size, 0, device=self._front_end.device)
        return self._advance(nothing, [0] * self.batch_size, [not ended for ended in self._ended])

    def state_dict(self) -> dict:
        """Return a copy of all state: plain containers and tensors, for torch.save or pickle."""
        return {'settings': self._settings(), **self._state().to_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on where another session on the same model was.

        Raises:
            ValueError: if it comes from a session with other settings, or is no such state.
        """
        if not isinstance(state, dict) or 'settings' not in state:
            raise ValueError("load_state_dict: this is no state of a StreamingSession")
        mine, theirs = self._settings(), state['settings']
        theirs = {'return_surprise': False, **theirs}  # before version 3 there was none
        other = [name for name in mine if mine[name] != theirs.get(name)]
        if other:
            raise ValueError(
                "load_state_dict: the state comes from a session with another "
                + ', '.join(f'{name} ({theirs.get(name)}, here {mine[name]})' for name in other)
            )
        restored = StreamState.from_dict(state, self._masking, self._encoder.device)
        self._ended, self._tails = restored.ended, restored.tails
        self._encoded, self._masked = restored.encoder, restored.masked
        self._targeted, self._surprised = restored.targets, restored.surprised

    def _state(self) -> StreamState:
        return StreamState(self._ended, self._tails, self._encoded, self._masked, self._targeted, self._surprised)

    def _settings(self) -> dict:
        encoder = self._encoder
        return {
            'batch_size': self.batch_size,
            'att_context_size': self.att_context.as_list(),
            'layer_contexts': [context.as_list() for context in encoder.contexts],
            'att_context_style': encoder.encoder.att_context_style,
            'subsampling_factor': encoder.factor,
            'd_model': encoder.encoder.d_model,
            'features': self._front_end.features,
            'hop': self._front_end.hop,
            'apply_mask': self._masking is not None,
            'return_surprise': self._surprise is not None,
        }

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

    def _check_eval_mode(self) -> None:
        if any(module.training for module in self._modules):
            raise ValueError("the model is in training mode; call model.eval() before streaming")

    def _checked(self, samples) -> torch.Tensor:
        if not isinstance(samples, torch.Tensor) or samples.dim() != 2 or samples.shape[0] != self.batch_size:
            what = tuple(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
            raise ValueError(f"samples are {what}; they must be a tensor [{self.batch_size}, n]")
        if not samples.is_floating_point():
            raise ValueError(f"samples are {samples.dtype}; they must be floating point, with full scale at 1")
        return samples.to(device=self._front_end.device, dtype=torch.float32)

    def _checked_lengths(self, lengths, available: int) -> list[int]:
        if lengths is None:
            if all(self._ended):
                raise ValueError("step: every stream has ended; reset() begins anew")
            return [0 if ended else available for ended in self._ended]
        lengths = [int(length) for length in _row_values(lengths, self.batch_size, 'lengths')]
        for row, length in enumerate(lengths):
            if not 0 <= length <= available:
                raise ValueError(f"lengths[{row}] is {length}; it must be from 0 to the {available} samples given")
            if length and self._ended[row]:
                raise ValueError(f"step: stream {row} has ended; reset([{row}]) begins it anew")
        return lengths

    def _checked_ends(self, ended) -> list[bool]:
        if ended is None:
            return [False] * self.batch_size
        ended = [bool(value) for value in _row_values(ended, self.batch_size, 'ended')]
        return [end and not before for end, before in zip(ended, self._ended)]

    def _advance(self, samples: torch.Tensor, lengths: list[int], ends: list[bool]) -> StreamingOutput:
        """Work through the samples in pieces, so that memory stays bounded however many there are."""
        piece = PIECE * self.frame_samples
        count = max(-(-max(lengths) // piece), 1)
        outputs = []
        with torch.inference_mode():
            for index in range(count):
                last = index == count - 1
                pieces = [
                    samples[row, : lengths[row]][index * piece : (index + 1) * piece] for row in range(len(ends))
                ]
                outputs.append(self._advance_by(pieces, [last and end for end in ends]))
            joined = StreamingOutput.concatenate(outputs)
        self._ended = [before or end for before, end in zip(self._ended, ends)]
        # tensors made in inference mode could not be used in training
        return StreamingOutput(**{name: copy_tensors(value) for name, value in vars(joined).items()})

    def _advance_by(self, pieces: list[torch.Tensor], ends: list[bool]) -> StreamingOutput:
        features = self._front_end.step(self._tails, pieces, ends)
        masks = [feature[:0, :0] for feature in features]
        seen, replace = features, None
        if self._targets is not None and self._targets.pre_conv:
            seen = [self._take_mask_frames(row, frames, masks) for row, frames in enumerate(features)]
        elif self._targets is not None:

            def replace(rows, frames):
                return torch.stack([self._take_mask_frames(row, x.T, masks).T for row, x in zip(rows, frames)])

        encoded = self._encoder.step(self._encoded, seen, ends, replace)
        return self._output(encoded, features, masks)

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

    def _output(self, encoded, features, masks) -> StreamingOutput:
        stacked, lengths = _pad(encoded)
        output = StreamingOutput(stacked, lengths, self.current_frame)
        if self.return_features:
            output.features, output.feature_lengths = _pad(features)
        if self._decoder is not None:
            self._predict(output)
        if self._masking is not None:
            masks, output.mask_lengths = _pad([mask if mask.numel() else mask.new_zeros(1, 0) for mask in masks])
            output.masks = masks[:, 0]
            self._score(output)
        if self._surprise is not None:
            self._compare(output)
        if not self.return_log_probs:
            output.log_probs = None
        return output

    def _predict(self, output: StreamingOutput) -> None:
        """Run the decoder, which takes each frame by itself."""
        output.log_probs = decode_frames(self._decoder, output.encoded)
        valid = _valid(output)
        shape = valid.shape + (1,) * (output.log_probs.dim() - 2)
        output.log_probs = output.log_probs * valid.view(shape)
        if self.return_tokens:
            output.tokens = output.log_probs.argmax(dim=2)

    def _score(self, output: StreamingOutput) -> None:
        losses = [
            self._masking.score(stream, log_probs[:length])
            for stream, log_probs, length in zip(self._masked, output.log_probs, output.lengths.tolist())
        ]
        step = StepLoss(sum(loss.total for loss in losses), sum(loss.frames for loss in losses))
        output.loss, output.masked_frames = step.mean, step.frames

    def _compare(self, output: StreamingOutput) -> None:
        """Predict the next tokens, and compare those that have come with what was predicted of them."""
        output.next_tokens, log_probs = self._surprise.predict(output.encoded, _valid(output))
        start = [stream.start for stream in self._surprised]
        output.surprise_start = torch.tensor(start, device=output.lengths.device)
        surprise = [
            self._surprise.score(stream, predicted[:length])
            for stream, predicted, length in zip(self._surprised, log_probs, output.lengths.tolist())
        ]
        stacked, output.surprise_lengths = _pad([row.unsqueeze(0) for row in surprise])
        output.surprise = stacked[:, 0]


def _parts(model) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return preprocessor and encoder of a model, or of the pair of them."""
    if isinstance(model, (tuple, list)) and len(model) == 2:
        return tuple(model)
    if not hasattr(model, 'preprocessor') or not hasattr(model, 'encoder'):
        raise ValueError(f"{type(model).__name__} has no preprocessor and encoder; give such a model, or the pair")
    return model.preprocessor, model.encoder


def _valid(output: StreamingOutput) -> torch.Tensor:
    """Return which frames are a stream's own, [B, A], True where they are."""
    return torch.arange(output.encoded.shape[2], device=output.lengths.device) < output.lengths[:, None]


def _row_values(values, batch_size: int, name: str) -> list:
    values = values.tolist() if hasattr(values, 'tolist') else list(values)
    if len(values) != batch_size:
        raise ValueError(f"{name} has {len(values)} values; it needs one for each of the {batch_size} streams")
    return values


def _pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack tensors [D, A] of different A; returns [B, D, A] with zeros at the ends, and the A [B]."""
    lengths = [row.shape[1] for row in rows]
    longest = max(lengths)
    stacked = torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows])
    return stacked, torch.tensor(lengths, device=stacked.device)


def _join(tensors, lengths, dim: int) -> torch.Tensor:
    """Join tensors of consecutive steps along ``dim``, leaving out the padding of each stream."""
    rows = []
    for row in range(tensors[0].shape[0]):
        parts = [tensor[row].narrow(dim - 1, 0, int(length[row])) for tensor, length in zip(tensors, lengths)]
        rows.append(torch.cat(parts, dim=dim - 1).transpose(0, dim - 1))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, dim)
