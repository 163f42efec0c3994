# SPDX-License-Identifier: Apache-2.0
"""Live streaming from raw samples, equal to offline.

Shapes: B streams, N samples, M mask frames, D width, A attention frames, S target frames, K horizons, C classes, H codebooks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.streaming.batch_runner import BatchRunner
from nemo.collections.asr.parts.streaming.linear import check_precision
from nemo.collections.asr.parts.streaming.mel import StreamingMel
from nemo.collections.asr.parts.streaming.observers import Observers
from nemo.collections.asr.parts.streaming.prepared_weights import reasons_against
from nemo.collections.asr.parts.streaming.ring_buffers import Stage
from nemo.collections.asr.parts.streaming.state import VERSION, check_like
from nemo.collections.asr.parts.streaming.text import (
    LiveText,
    TextOptions,
    TextUpdate,
    Transcript,
    decode_frames,
    decoder_of,
)
from nemo.utils import logging

LOUD = 8.0  # a peak of samples far above full scale
COUNTED = {  # what there is for each frame, by what counts them
    'lengths': ('encoded', 'log_probs', 'tokens', 'next_tokens'),
    'mask_lengths': ('masks',),
    'surprise_lengths': ('surprise',),
}


@dataclass
class StreamingOutput:
    """The output of a step. Frames at or beyond a stream's length are 0.

    - ``encoded`` [B, D, A], of which each stream has ``lengths`` [B] int64.
    - ``current_frame`` [B] int64: mask frames that each stream has received: feature frames, or attention frames with masking
      after the convolutions.
    - ``failed``: streams that have failed since they were last reset, with the reason. They give no frames.
    - ``log_probs`` [B, A, C] or [B, A, C, H] and ``tokens`` [B, A] or [B, A, H] int64, on request: what the model's decoder
      gives, and the likeliest class, blanks included.
    - ``text``, with ``return_text``: what is new in the text of each stream.
    - With ``apply_mask``: ``masks`` [B, M], 1 where a new mask frame is masked, of which each stream has ``mask_lengths`` [B]
      int64; ``loss``, in nats per masked frame whose target and prediction this step completed, and ``masked_frames``, their
      number.
    - With ``return_surprise``: ``next_tokens`` [B, A, K] or [B, A, K, H] int64, the likeliest that frame j predicts at horizon
      k, of token j + ``session.next_token_offset`` + k; ``surprise`` [B, S], nats at horizon 0 of each token that is known
      since this step, of which each stream has ``surprise_lengths`` [B] int64, from index ``surprise_start`` [B] int64 on.
    """

    encoded: Tensor
    lengths: Tensor
    current_frame: Tensor
    failed: dict[int, str] = field(default_factory=dict)
    log_probs: Tensor | None = None
    tokens: Tensor | None = None
    masks: Tensor | None = None
    mask_lengths: Tensor | None = None
    loss: Tensor | None = None
    masked_frames: int = 0
    next_tokens: Tensor | None = None
    surprise: Tensor | None = None
    surprise_lengths: Tensor | None = None
    surprise_start: Tensor | None = None
    text: list[TextUpdate] | None = None

    @classmethod
    def concatenate(cls, outputs: Sequence['StreamingOutput']) -> 'StreamingOutput':
        """Join outputs, one or more, of consecutive steps; ``loss`` becomes that of all masked frames."""
        if not outputs:
            raise ValueError("concatenate: there is no output to join")
        first, last = outputs[0], outputs[-1]
        joined = replace(last, surprise_start=first.surprise_start)
        for counts, names in COUNTED.items():
            sizes = [getattr(output, counts) for output in outputs]
            for name in names:
                if getattr(first, name) is not None:
                    parts = [getattr(output, name) for output in outputs]
                    setattr(joined, name, _join(parts, sizes, dim=2 if name == 'encoded' else 1))
            setattr(joined, counts, None if sizes[0] is None else sum(sizes))
        if first.text is not None:
            joined.text = [*map(TextUpdate.concatenate, zip(*(output.text for output in outputs)))]
        if first.loss is not None:
            joined.masked_frames = sum(output.masked_frames for output in outputs)
            total: Any = sum(output.loss * output.masked_frames for output in outputs)  # type: ignore[operator, misc]
            joined.loss = total / max(joined.masked_frames, 1)
        return joined


class StreamingSession:
    """A batch of live streams through a model in eval mode, in one context. All state is here.

    In steps of any size, the joined output equals the offline forward of the same samples. Sessions of one model may run in
    several threads at once. Weights are taken when the session is made and when :meth:`reset` restarts all streams.

    A stream whose output is not finite fails alone: ``output.failed`` has the reason, and it gives no frames until it is reset.
    If an error interrupts a step, the streams that it was to advance are broken until they are reset or loaded.

    Args:
        model: with ``preprocessor`` and ``encoder`` (an SSL model, a CTC model), or the two as a pair.
        batch_size: B.
        att_context_size: anything that ``AttContext.parse`` reads; None takes the encoder's default.
        return_log_probs, return_tokens: whether to give what the model's decoder gives, and its likeliest classes.
        apply_mask: whether to mask, to watch the loss of an SSL model live. Draws from torch's generator.
        return_surprise: whether to predict the next tokens, and to give the surprise of each once it is there.
        return_text: whether to decode the text of each stream, with a CTC, RNNT or hybrid model; ``TextOptions`` set how.
        weights: of the layers, on a CPU: 'float32'; 'bfloat16' and 'int8' are smaller, and no longer equal to offline.
        sample_rate: of the samples, in Hz. It must be that of the model, which None takes.

    Attributes:
        sample_rate: samples per second of each stream.
        frame_samples: samples of an attention frame.
        look_ahead_samples: samples after the first one of an attention frame that its output waits for, at most.
        next_token_offset: how many tokens after its own a frame predicts at the first horizon; None without surprise.

    Raises:
        ValueError: if the model's configuration cannot stream, with the reason, or lacks what is requested.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int = 1,
        att_context_size: Any = None,
        return_log_probs: bool = False,
        return_tokens: bool = False,
        apply_mask: bool = False,
        return_surprise: bool = False,
        return_text: bool | TextOptions = False,
        weights: str = 'float32',
        sample_rate: int | None = None,
    ):
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be 1 stream or more")
        default = getattr(_parts(model)[1], 'att_context_size', None)
        self.att_context = AttContext.parse(default if att_context_size is None else att_context_size)
        self.batch_size, self.weights, self.return_text = batch_size, weights, return_text
        self.return_log_probs, self.return_tokens = return_log_probs, return_tokens
        self.apply_mask, self.return_surprise = apply_mask, return_surprise
        self._model, self._warned = model, False
        self._build()
        if sample_rate not in (None, self.sample_rate):
            found = f"sample_rate is {sample_rate}; the model takes {self.sample_rate} Hz"
            raise ValueError(f"{found}: resample the samples")

    def _build(self) -> None:
        """Take the model as it is now, and start all streams."""
        modules = preprocessor, encoder = _parts(self._model)
        _check_eval_mode(*modules)
        decodes = self.return_log_probs or self.return_tokens or self.apply_mask
        decoder = decoder_of(self._model) if decodes else None
        check_precision(self.weights, next(encoder.parameters()))
        mel, observers, text = StreamingMel(preprocessor), None, None
        if self.apply_mask or self.return_surprise:
            wanted = self.apply_mask, self.return_surprise
            observers = Observers(self._model, self.att_context, self.batch_size, mel.features, *wanted)
        with torch.inference_mode():
            runner = BatchRunner(mel, encoder, self.att_context, self.batch_size, self.weights, observers)
        frame_samples = mel.hop * runner.factor
        if self.return_text:
            options = self.return_text if isinstance(self.return_text, TextOptions) else TextOptions()
            text = LiveText(self._model, self.batch_size, frame_samples / mel.sample_rate, options, runner.device)
        self.sample_rate, self.frame_samples = mel.sample_rate, frame_samples
        self.look_ahead_samples = mel.look_ahead + runner.look_ahead * frame_samples
        self.next_token_offset = observers.surprise.offset if observers and observers.surprise else None
        self._modules, self._decoder = modules, decoder
        self._runner, self._observers, self._text = runner, observers, text
        self._streams = Stage(ended=np.zeros(self.batch_size, bool), failed=np.zeros(self.batch_size, bool))
        self._broken: np.ndarray = np.zeros(self.batch_size, bool)
        self._flags: list[tuple[Any, Tensor]] = []  # of earlier steps: a GPU's event, and which rows are finite

    @property
    def why_not_fast(self) -> str | None:
        """The first part of the present model that live streams do not compute; None: they compute all."""
        return next(reasons_against(_parts(self._model)[1], self.att_context), None)

    @property
    def cache_bytes_per_stream(self) -> int:
        """Present bytes of state and tables per stream; they grow with an unlimited left context only."""
        return sum(stage.bytes() for stage in self._stages()) // self.batch_size

    @property
    def current_frame(self) -> Tensor:
        """Mask frames received so far by each stream, [B] int64; see ``StreamingOutput.current_frame``."""
        return self._runner.received(getattr(self._model, 'pre_encoder', None) is not None, self._streams.ended)

    @property
    def ended(self) -> tuple[bool, ...]:
        """For each stream, whether it has ended."""
        return tuple(self._streams.ended.tolist())

    def reset(self, streams: int | Sequence[int] | None = None) -> None:
        """Restart all streams with the present weights, or those with these indices while the others continue.

        ValueError, and no change, if there is no such stream or the model no longer streams.
        """
        if streams is None:
            self._build()
            return
        rows = [self._checked_row(row, 'reset') for row in (streams if np.iterable(streams) else [streams])]
        self._broken[rows] = True
        with torch.inference_mode():
            self._read_flags(wait=True)
            for part in self._stages():
                part.reset(rows)
        self._broken[rows] = False

    def step(self, samples: Tensor, lengths: Any = None, ended: Any = None) -> StreamingOutput:
        """Take samples and return all frames that they complete.

        Args:
            samples: [B, N] floating point, any N; full scale is 1. Rows of streams that have ended are not read.
            lengths: how many samples of each row belong to its stream, [B]; None: all N.
            ended: for each stream, whether it ends with these samples, [B] bool; None: none does.

        Raises:
            ValueError: if arguments do not fit, samples are not finite, or a stream has ended or is broken; none is taken.
        """
        _check_eval_mode(*self._modules)
        samples, lengths, ends = self._checked_arguments(samples, lengths, ended)
        moved = (lengths > 0) | ends
        self._check_whole(moved, 'step')
        self._check_finite(samples, lengths)
        self._broken[moved] = True  # until the step is over
        with torch.inference_mode():
            self._read_flags()
            if self._streams.failed.any():
                samples = samples.clone()
                samples[np.flatnonzero(self._streams.failed).tolist()] = 0.0
            encoded, counts = self._runner.step(samples, lengths, ends)
            self._streams.ended |= ends
            output = self._output(encoded, counts)
        # tensors made in inference mode could not be used in training
        for name, value in vars(output).items():
            if isinstance(value, Tensor) and value.is_inference():
                setattr(output, name, value.clone())
        self._broken[moved] = False
        return output

    def finish(self) -> StreamingOutput:
        """End all streams and return their remaining frames, as offline; errors as of :meth:`step`."""
        return self.step(torch.zeros(self.batch_size, 0), None, [True] * self.batch_size)

    def transcript(self, row: int = 0) -> Transcript:
        """Return the whole text of a stream, which needs ``return_text``; its cost grows with the stream."""
        if self._text is None:
            raise ValueError("transcript: the session has no text; set return_text=True")
        return self._text.transcript(self._checked_row(row, 'transcript'))

    def export(self, row: int) -> dict[str, Any]:
        """Return a copy of the state of an unbroken stream: plain containers and tensors, for torch.save."""
        row = self._checked_row(row, 'export')
        self._read_flags(wait=True)
        self._check_whole(np.arange(self.batch_size) == row, 'export')
        return {'version': VERSION, 'of': self._settings(), 'stages': [part.export(row) for part in self._stages()]}

    def load(self, row: int, state: dict[str, Any]) -> None:
        """Continue an exported stream in the place of another one; sessions may have any number of streams.

        ValueError, and no change, if the state is of another model, context or setting, or damaged.
        """
        self._load({self._checked_row(row, 'load'): state})

    def state_dict(self) -> dict[str, Any]:
        """Return the exported states of all streams."""
        return {'streams': [self.export(row) for row in range(self.batch_size)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a session with as many streams was; errors as of :meth:`load`."""
        streams: Any = state.get('streams') if isinstance(state, dict) else None
        count = len(streams) if isinstance(streams, list) else 0
        if count != self.batch_size:
            raise ValueError(f"load: this is a state of {count} streams; this session has {self.batch_size}")
        self._load(dict(enumerate(streams)))

    def _stages(self) -> list[Any]:
        parts = self._streams, *self._runner.stages, self._observers, self._text
        return [part for part in parts if part is not None]

    def _settings(self) -> dict[str, Any]:
        text = None if self._text is None else self._text.kind
        own = {name: getattr(self, name) for name in ('weights', 'apply_mask', 'return_surprise')}
        return {**self._runner.settings(), **own, 'return_text': text}

    def _check_state(self, state: Any) -> None:
        """Raise ValueError unless a state is whole, and one of a stream of this model, context and settings."""
        if not isinstance(state, dict) or state.get('version') != VERSION or not isinstance(state.get('of'), dict):
            raise ValueError("load: this is no state of a StreamingSession of this version")
        pairs = {name: (state['of'].get(name), here) for name, here in self._settings().items()}
        if other := [f'{name} ({given}, here {here})' for name, (given, here) in pairs.items() if given != here]:
            raise ValueError(f"load: the state is of a session with another {', '.join(other)}")
        parts = self._stages()
        check_like(state.get('stages'), [None] * len(parts), 'stages')
        for part, of_part in zip(parts, state['stages'], strict=True):
            part.check(of_part)

    def _load(self, states: dict[int, Any]) -> None:
        for state in states.values():
            self._check_state(state)
        self._read_flags(wait=True)
        self._broken[[*states]] = True
        with torch.inference_mode():
            for row, state in states.items():
                for part, of_part in zip(self._stages(), state['stages'], strict=True):
                    part.load(row, of_part)
        self._broken[[*states]] = False

    def _checked_row(self, row: Any, what: str) -> int:
        whole = isinstance(row, (int, np.integer)) and not isinstance(row, bool)
        if not whole or not 0 <= row < self.batch_size:
            raise ValueError(f"{what}: there is no stream {row!r}; the session has {self.batch_size}")
        return int(row)

    def _check_whole(self, rows: np.ndarray, what: str) -> None:
        for row in np.flatnonzero(rows & self._broken):
            found = f"stream {row} is broken by an error in an earlier step"
            raise ValueError(f"{what}: {found}; reset({row}) restarts it")

    def _checked_arguments(self, samples: Any, lengths: Any, ended: Any) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Return the arguments of a step as float32, int64 and bool."""
        shape = [*samples.shape] if isinstance(samples, Tensor) else type(samples).__name__
        if shape[:1] != [self.batch_size] or len(shape) != 2:
            raise ValueError(f"samples are {shape}; they must be a tensor [{self.batch_size}, n]")
        if not samples.is_floating_point():
            raise ValueError(f"samples are {samples.dtype}; they must be floating point, with full scale at 1")
        available, over = samples.shape[1], self._streams.ended
        if lengths is None:
            if over.all():
                raise ValueError("step: every stream has ended; reset() restarts them")
            counts = np.where(over, 0, available)
        else:
            counts = self._per_stream(lengths, 'lengths')
            for row in np.flatnonzero((counts < 0) | (counts > available) | (counts % 1 != 0)):
                allowed = f'a whole number from 0 to the {available} samples given'
                raise ValueError(f"lengths[{row}] is {counts[row]}; it must be {allowed}")
            for row in np.flatnonzero((counts > 0) & over):
                raise ValueError(f"step: stream {row} has ended; reset([{row}]) restarts it")
        ends = np.zeros(self.batch_size) if ended is None else self._per_stream(ended, 'ended')
        return samples.to(dtype=torch.float32), counts.astype(np.int64), ends.astype(bool) & ~over

    def _per_stream(self, values: Any, name: str) -> np.ndarray:
        values = np.array(values.tolist() if hasattr(values, 'tolist') else list(values))
        if values.shape != (self.batch_size,):
            raise ValueError(f"{name} are {values.tolist()}; they must be {self.batch_size}, one for each stream")
        return values

    def _check_finite(self, samples: Tensor, lengths: np.ndarray) -> None:
        """Check the samples where they came from: those of a microphone need no synchronisation."""
        taken = samples[:, : int(lengths.max())]
        if not taken.numel() or _peak(taken) <= LOUD:
            return
        for row in np.flatnonzero((lengths > 0) & ~self._streams.failed):
            peak = _peak(samples[row, : lengths[row]])
            if not math.isfinite(peak):
                raise ValueError(f"samples of stream {row} have NaN or infinite values")
            if peak > LOUD and not self._warned:
                logging.warning(f"Samples reach {peak:.3g}; full scale is 1, as of soundfile's float32.")
                self._warned = True

    def _output(self, encoded: Tensor, counts: np.ndarray) -> StreamingOutput:
        """Return the output of a step, from frames [B, A, D] and how many each stream has [B]."""
        self._find_failed(encoded)
        failed = np.flatnonzero(self._streams.failed).tolist()
        if failed:
            encoded[failed], counts[failed] = 0.0, 0
        lengths = torch.from_numpy(counts).to(encoded.device, non_blocking=True)
        reasons = dict.fromkeys(failed, 'its output holds NaN or infinite values')
        output = StreamingOutput(encoded.transpose(1, 2), lengths, self.current_frame, reasons)
        if self._decoder is not None or self._observers is not None:
            valid = torch.arange(encoded.shape[1], device=encoded.device) < lengths[:, None]
        if self._decoder is not None:  # it takes each frame by itself
            log_probs = decode_frames(self._decoder, output.encoded)
            output.log_probs = log_probs.masked_fill(~valid.view(*valid.shape, *[1] * (log_probs.dim() - 2)), 0)
            output.tokens = output.log_probs.argmax(dim=2) if self.return_tokens else None
        if self._observers is not None:
            self._observers.finish(output, valid, failed)
        if self._text is not None:
            output.text = self._text.take(output.encoded, counts.tolist(), self.ended, output.log_probs)
        if not self.return_log_probs:
            output.log_probs = None
        return output

    def _find_failed(self, encoded: Tensor) -> None:
        """Find rows whose frames [B, A, D] are not finite; on a GPU mostly one step later."""
        on_cpu = encoded.device.type == 'cpu'
        if not encoded.numel() or (on_cpu and math.isfinite(float(encoded.sum()))):
            return
        flags = encoded.isfinite().flatten(1).all(dim=1).to('cpu', non_blocking=True)
        self._flags.append((torch.cuda.current_stream().record_event() if encoded.is_cuda else None, flags))
        self._read_flags(wait=on_cpu or self._text is not None or bool(self._streams.ended.all()))

    def _read_flags(self, wait: bool = False) -> None:
        while self._flags and (wait or self._flags[0][0] is None or self._flags[0][0].query()):
            event, flags = self._flags.pop(0)
            if event is not None:
                event.synchronize()
            new = np.flatnonzero(~flags.numpy() & ~self._streams.failed).tolist()
            self._streams.failed[new] = True
            for stage in self._runner.stages if new else ():
                stage.reset(new, counts=False)  # their values; the batch continues


def _peak(samples: Tensor) -> float:
    """Return the largest absolute value, NaN if there is any."""
    return float(samples.abs().amax())


def _parts(model: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    if isinstance(model, (tuple, list)) and len(model) == 2:
        return model[0], model[1]
    if not hasattr(model, 'preprocessor') or not hasattr(model, 'encoder'):
        raise ValueError(f"{type(model).__name__} has no preprocessor and encoder; give such a model, or the pair")
    return model.preprocessor, model.encoder


def _check_eval_mode(*modules: torch.nn.Module) -> None:
    if any(module.training for module in modules):
        raise ValueError("the model is in training mode; call model.eval() before streaming")


def _join(tensors: list[Tensor], lengths: list[Tensor], dim: int) -> Tensor:
    """Join tensors of consecutive steps along ``dim``, leaving out the padding of each stream."""
    rows = [
        torch.cat([part[: int(size)] for part, size in zip(parts, sizes)])
        for parts, sizes in zip(zip(*(tensor.transpose(1, dim) for tensor in tensors)), zip(*lengths))
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, dim)
