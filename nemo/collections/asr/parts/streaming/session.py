# SPDX-License-Identifier: Apache-2.0
"""Live streaming from raw samples, equal to offline.

::

    session = StreamingSession(model, att_context_size=[40, 0], return_log_probs=True)
    for samples in microphone:                          # [1, n], any n
        output = session.step(samples)                  # output.encoded [1, D, frames], usually 0 or 1 frames
    output = session.finish()

Shapes: B streams, N samples, D the encoder's width, A attention frames.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.streaming.batch_runner import BatchRunner
from nemo.collections.asr.parts.streaming.decoding import decode_frames, decoder_of
from nemo.collections.asr.parts.streaming.encoder import StreamingEncoder, why_not
from nemo.collections.asr.parts.streaming.linear import check_precision
from nemo.collections.asr.parts.streaming.mel import StreamingMel
from nemo.collections.asr.parts.streaming.observers import Observers
from nemo.collections.asr.parts.streaming.output import StreamingOutput, valid_frames
from nemo.collections.asr.parts.streaming.state import VERSION, check_settings
from nemo.collections.asr.parts.streaming.text import LiveText, TextOptions, Transcript
from nemo.utils import logging

NOT_FINITE = 'its output holds NaN or infinite values'
LOUD = 8.0  # a peak of samples far above full scale


class StreamingSession:
    """A batch of live streams through a model, in one attention context. All state is here, none in the model.

    Fed in any pieces, the joined output equals the offline forward of the same samples. Sessions of one model may run in
    several threads at once. The model must be in eval mode. Its weights are taken when the session is made and when
    :meth:`reset` restarts all streams; changes in between have no effect.

    A stream whose output is not finite fails: ``output.failed`` has the reason, its state is set to zero, and it gives no
    frames until it is reset. The other streams are not affected. A step that an error interrupts leaves the streams that
    it was to move on broken: they take no samples until they are reset or loaded.

    Args:
        model: with ``preprocessor`` and ``encoder`` (an SSL model, a CTC model), or the two as a pair.
        batch_size: B.
        att_context_size: the context, anything that ``AttContext.parse`` reads; None takes the encoder's default. The
            layers' own contexts narrow it.
        return_log_probs: whether to run the model's decoder.
        return_tokens: whether to give its likeliest classes.
        apply_mask: whether to mask, to watch the loss of an SSL model live; see ``LiveMasking``. Draws from torch's
            generator.
        return_surprise: whether to predict the next tokens, and to give the surprise of each token once it is there; for a
            model whose objective predicts next tokens, see ``LiveSurprise``. With ``apply_mask`` they are predicted from
            the masked stream, as ``model.objective: both`` trains it.
        return_text: whether to decode the text of each stream, with a CTC, RNNT or hybrid model; ``TextOptions`` set how.
        weights: what the layers' weights are held in, on a CPU: 'float32'; 'bfloat16' and 'int8' are smaller and faster, and
            no longer equal to offline.
        sample_rate: of the samples, in Hz; must be that of the model. None: that of the model.

    Raises:
        ValueError: if the model's configuration cannot stream, with the reason, or lacks what is requested.
    """

    def __init__(
        self,
        model,
        batch_size: int = 1,
        att_context_size=None,
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
        encoder = _parts(model)[1]
        default = getattr(encoder, 'att_context_size', None) if att_context_size is None else att_context_size
        self.att_context, self.batch_size, self.weights = AttContext.parse(default), batch_size, weights
        self.return_log_probs, self.return_tokens, self.return_text = return_log_probs, return_tokens, return_text
        self.apply_mask, self.return_surprise = apply_mask, return_surprise
        self._model, self._warned = model, False
        self._build()
        if sample_rate not in (None, self.sample_rate):
            raise ValueError(
                f"sample_rate is {sample_rate}; the model takes {self.sample_rate} Hz: resample the samples"
            )

    def _build(self) -> None:
        """Take the model as it is now, and start all streams."""
        modules = preprocessor, encoder = _parts(self._model)
        _check_eval_mode(*modules)
        decodes = self.return_log_probs or self.return_tokens or self.apply_mask
        decoder = decoder_of(self._model) if decodes else None
        mel, streaming = StreamingMel(preprocessor), StreamingEncoder(encoder, self.att_context)
        check_precision(self.weights, next(encoder.parameters()))
        observers, hooks, text = None, {}, None
        if self.apply_mask or self.return_surprise:
            wanted = self.apply_mask, self.return_surprise
            observers = Observers(self._model, self.att_context, self.batch_size, mel.features, *wanted)
            hooks = {observers.hook: observers.take}
        with torch.inference_mode():
            runner = BatchRunner(mel, streaming, self.batch_size, self.weights, **hooks)
        if self.return_text:
            options = TextOptions() if self.return_text is True else self.return_text
            seconds = mel.hop * streaming.factor / mel.sample_rate
            text = LiveText(self._model, self.batch_size, seconds, options, streaming.device)
        self._modules, self._decoder = modules, decoder
        self._mel, self._encoder, self._runner, self._observers, self._text = mel, streaming, runner, observers, text
        self._ended: np.ndarray = np.zeros(self.batch_size, bool)
        self._broken: np.ndarray = np.zeros(self.batch_size, bool)
        self._failed: dict[int, str] = {}
        self._flags: list = []  # of earlier steps on a GPU: their events, and which rows are finite

    @property
    def why_not_fast(self) -> str | None:
        """The first part of the model, as it is now, that live streams do not compute; None: they compute all of it."""
        return why_not(_parts(self._model)[1], self.att_context)

    @property
    def sample_rate(self) -> int:
        """Samples per second of each stream."""
        return self._mel.sample_rate

    @property
    def frame_samples(self) -> int:
        """Samples of an attention frame."""
        return self._mel.hop * self._encoder.factor

    @property
    def look_ahead_samples(self) -> int:
        """Samples after the first one of an attention frame that its output waits for, at most.

        Attention frame i begins with the centre of feature frame factor * i: half a window, and the right context of
        the attention (in ``regular`` style of all layers together).
        """
        return self._mel.look_ahead + self._encoder.look_ahead * self.frame_samples

    @property
    def next_token_offset(self) -> int | None:
        """How many tokens after its own a frame predicts at the first horizon; None without ``return_surprise``."""
        return self._observers.surprise.offset if self.return_surprise else None  # type: ignore[union-attr]

    @property
    def cache_bytes_per_stream(self) -> int:
        """Bytes of state and of tables of positions now, per stream; they grow only with an unlimited left context."""
        observed = 0 if self._observers is None else self._observers.bytes()
        return (self._runner.bytes() + observed) // self.batch_size

    @property
    def current_frame(self) -> torch.Tensor:
        """Mask frames received so far by each stream, [B] int64; see ``StreamingOutput.current_frame``."""
        return self._runner.received(getattr(self._model, 'pre_encoder', None) is not None, self._ended)

    @property
    def ended(self) -> tuple[bool, ...]:
        """For each stream, whether it has ended."""
        return tuple(self._ended.tolist())

    def reset(self, streams: int | Sequence[int] | None = None) -> None:
        """Restart all streams with the present weights, or those with these indices while the others continue.

        Raises:
            ValueError: if an index is out of range, or the model no longer streams; nothing is changed then.
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
        for row in rows:
            self._failed.pop(row, None)
        self._ended[rows] = self._broken[rows] = False

    def step(self, samples, lengths=None, ended=None) -> StreamingOutput:
        """Take samples and give out all frames that they complete.

        Args:
            samples: [B, N] floating point, any N; full scale is 1. Rows of streams that have ended are not read.
            lengths: how many samples of each row belong to its stream, [B]; None: all N.
            ended: for each stream, whether it ends with these samples, [B] bool; None: none does.

        Raises:
            ValueError: if the samples have another shape or dtype or are not finite, or a stream is fed after its end or
                after an error; nothing is taken then.
        """
        _check_eval_mode(*self._modules)
        shape = [*samples.shape] if isinstance(samples, torch.Tensor) else type(samples).__name__
        if shape[:1] != [self.batch_size] or len(shape) != 2:
            raise ValueError(f"samples are {shape}; they must be a tensor [{self.batch_size}, n]")
        if not samples.is_floating_point():
            raise ValueError(f"samples are {samples.dtype}; they must be floating point, with full scale at 1")
        samples = samples.to(dtype=torch.float32)
        lengths = self._checked_lengths(lengths, samples.shape[1])
        ends: np.ndarray = np.zeros(self.batch_size, bool)
        if ended is not None:
            ends = np.array(self._row_values(ended, 'ended')).astype(bool) & ~self._ended
        self._check_whole((lengths > 0) | ends, 'step')
        self._check_finite(samples, lengths)
        return self._advance(samples, lengths, ends)

    def finish(self) -> StreamingOutput:
        """End all streams and give out what is left of them, as the offline forward would see it.

        Raises:
            ValueError: if all of them have ended already, or an earlier step broke one.
        """
        _check_eval_mode(*self._modules)
        if self._ended.all():
            raise ValueError("finish: every stream has ended already; reset() restarts them")
        self._check_whole(~self._ended, 'finish')
        return self._advance(torch.zeros(self.batch_size, 0), np.zeros(self.batch_size, np.int64), ~self._ended)

    def transcript(self, row: int = 0) -> Transcript:
        """Return the whole text of a stream; its cost grows with the stream.

        Raises:
            ValueError: without ``return_text``, or if there is no such stream.
        """
        if self._text is None:
            raise ValueError("transcript: the session has no text; set return_text=True")
        return self._text.transcript(self._checked_row(row, 'transcript'))

    def export(self, row: int) -> dict:
        """Return a copy of the state of a stream: plain containers and tensors, for torch.save or pickle.

        Raises:
            ValueError: if there is no such stream, or an earlier step broke it.
        """
        row = self._checked_row(row, 'export')
        self._read_flags(wait=True)
        self._check_whole(np.arange(self.batch_size) == row, 'export')
        stages = [part.export(row) for part in self._stages()]
        stream = {'ended': bool(self._ended[row]), 'failed': self._failed.get(row), 'stages': stages}
        return {'version': VERSION, 'of': self._settings(), 'stream': stream}

    def load(self, row: int, state: dict) -> None:
        """Continue an exported stream in the place of another one; sessions may have any number of streams.

        Raises:
            ValueError: if there is no such stream, or the state is of a session with another model, context or setting, or
                damaged; nothing is changed then.
        """
        row = self._checked_row(row, 'load')
        self._check_state(state)
        self._load(row, state['stream'])

    def state_dict(self) -> dict:
        """Return the exported states of all streams."""
        return {'streams': [self.export(row) for row in range(self.batch_size)]}

    def load_state_dict(self, state: dict) -> None:
        """Continue where another session on the same model was.

        Raises:
            ValueError: if it comes from a session with other settings or another number of streams, or is damaged; nothing
                is changed then.
        """
        streams = state.get('streams') if isinstance(state, dict) else None
        if not isinstance(streams, list):
            raise ValueError("load: this is no state of a StreamingSession")
        if len(streams) != self.batch_size:
            raise ValueError(f"load: the state has {len(streams)} streams; this session has {self.batch_size}")
        for stream in streams:
            self._check_state(stream)
        self._broken[:] = True
        for row, stream in enumerate(streams):
            self._load(row, stream['stream'])

    def _stages(self) -> list:
        """Return all that keeps something of each stream."""
        return [*self._runner.stages, *(part for part in (self._observers, self._text) if part is not None)]

    def _check_state(self, state) -> None:
        """Raise ValueError unless a state is whole, and one of a stream of this model, context and settings."""
        check_settings(state, self._settings())
        parts, stream = self._stages(), state.get('stream')
        if not isinstance(stream, dict) or not isinstance(stream.get('ended'), bool) or 'failed' not in stream:
            raise ValueError("load: this is no state of a stream")
        if not isinstance(stream.get('stages'), list) or len(stream['stages']) != len(parts):
            raise ValueError(f"load: stages is damaged; it must be a list of {len(parts)}")
        for part, of_part in zip(parts, stream['stages'], strict=True):
            part.check(of_part)

    def _load(self, row: int, stream: dict) -> None:
        self._read_flags(wait=True)
        self._broken[row] = True
        with torch.inference_mode():
            for part, state in zip(self._stages(), stream['stages'], strict=True):
                part.load(row, state)
        self._failed.pop(row, None)
        if stream['failed'] is not None:
            self._failed[row] = stream['failed']
        self._ended[row], self._broken[row] = stream['ended'], False

    def _settings(self) -> dict:
        return {
            **self._encoder.settings(),
            **self._mel.settings(),
            'encoder': self._runner.weights.digest,
            'weights': self.weights,
            'apply_mask': self.apply_mask,
            'return_surprise': self.return_surprise,
            'return_text': None if self._text is None else self._text.kind,
        }

    def _checked_row(self, row, what: str) -> int:
        whole = isinstance(row, (int, np.integer)) and not isinstance(row, bool)
        if not whole or not 0 <= row < self.batch_size:
            raise ValueError(f"{what}: there is no stream {row!r}; the session has {self.batch_size}")
        return int(row)

    def _check_whole(self, rows: np.ndarray, what: str) -> None:
        broken = np.flatnonzero(rows & self._broken)
        if len(broken):
            raise ValueError(
                f"{what}: stream {broken[0]} is broken by an error in an earlier step; reset([{broken[0]}]) or load "
                "restarts it"
            )

    def _check_finite(self, samples: torch.Tensor, lengths: np.ndarray) -> None:
        """Look at the samples where they came from: those of a microphone make no device wait."""
        taken = samples[:, : int(lengths.max())]
        if not taken.numel():
            return
        if samples.device.type == 'cpu':  # NumPy takes a quarter of the time of torch for so few
            values = taken.detach().numpy()
            peak = max(float(values.max()), -float(values.min()))
        else:
            peak = float(taken.abs().amax())
        if peak <= LOUD:
            return
        peak = 0.0
        for row in set(np.flatnonzero(lengths).tolist()) - self._failed.keys():
            own = float(samples[row, : lengths[row]].abs().amax())
            if not math.isfinite(own):
                raise ValueError(f"samples of stream {row} hold NaN or infinite values")
            peak = max(peak, own)
        if peak > LOUD and not self._warned:
            logging.warning(f"Samples reach {peak:.3g}; full scale is 1, as of soundfile's float32.")
            self._warned = True

    def _checked_lengths(self, lengths, available: int) -> np.ndarray:
        ended = self._ended
        if lengths is None:
            if ended.all():
                raise ValueError("step: every stream has ended; reset() restarts them")
            return np.where(ended, 0, available)
        lengths = np.array(self._row_values(lengths, 'lengths'))
        if lengths.ndim != 1 or (lengths % 1).any():
            raise ValueError(f"lengths are {lengths.tolist()}; they must be whole numbers, one for each stream")
        lengths = lengths.astype(np.int64)
        for row in np.flatnonzero((lengths < 0) | (lengths > available)):
            raise ValueError(f"lengths[{row}] is {lengths[row]}; it must be from 0 to the {available} samples given")
        for row in np.flatnonzero((lengths > 0) & ended):
            raise ValueError(f"step: stream {row} has ended; reset([{row}]) restarts it")
        return lengths

    def _row_values(self, values, name: str) -> list:
        values = values.tolist() if hasattr(values, 'tolist') else list(values)
        if len(values) != self.batch_size:
            raise ValueError(
                f"{name} has {len(values)} values; it needs one for each of the {self.batch_size} streams"
            )
        return values

    def _advance(self, samples: torch.Tensor, lengths: np.ndarray, ends: np.ndarray) -> StreamingOutput:
        moved = (lengths > 0) | ends
        self._broken[moved] = True  # until the step is over
        with torch.inference_mode():
            self._read_flags()
            if self._failed:
                samples = samples.clone()
                samples[list(self._failed)] = 0.0
            encoded, counts = self._runner.step(samples, lengths, ends)
            self._ended |= ends
            output = self._output(encoded, counts)
        # tensors made in inference mode could not be used in training
        for name, value in vars(output).items():
            if isinstance(value, torch.Tensor) and value.is_inference():
                setattr(output, name, value.clone())
        self._broken[moved] = False
        return output

    def _output(self, encoded: torch.Tensor, counts: np.ndarray) -> StreamingOutput:
        """Return what a step gives out, of frames [B, A, D] and how many each stream has [B]."""
        self._find_failed(encoded)
        failed = list(self._failed)
        if failed:
            encoded[failed], counts[failed] = 0.0, 0
        lengths = torch.from_numpy(counts).to(encoded.device, non_blocking=True)
        output = StreamingOutput(encoded.transpose(1, 2), lengths, self.current_frame, dict(self._failed))
        if self._decoder is not None:  # it takes each frame by itself
            log_probs, valid = decode_frames(self._decoder, output.encoded), valid_frames(output)
            output.log_probs = log_probs.masked_fill(~valid.view(*valid.shape, *[1] * (log_probs.dim() - 2)), 0)
            output.tokens = output.log_probs.argmax(dim=2) if self.return_tokens else None
        if self._observers is not None:
            self._observers.finish(output, failed)
        if self._text is not None:
            output.text = self._text.take(output.encoded, counts.tolist(), self._ended.tolist(), output.log_probs)
        if not self.return_log_probs:
            output.log_probs = None
        return output

    def _find_failed(self, encoded: torch.Tensor) -> None:
        """Find the rows whose frames [B, A, D] are not finite, and set their state to zero.

        On a CPU this step's are read. On a GPU the flags are copied while it works, and read in a later step: nothing
        waits, and ``output.failed`` is that much late. With text, which is read anyway, and at the end of
        all streams they are read at once.
        """
        if not encoded.numel():
            return
        if encoded.device.type == 'cpu' and math.isfinite(float(encoded.sum())):
            return
        flags = encoded.isfinite().flatten(1).all(dim=1).to('cpu', non_blocking=True)
        event = None
        if encoded.device.type == 'cuda':
            event = torch.cuda.Event()
            event.record()
        self._flags.append((event, flags))
        if encoded.device.type == 'cpu' or self._text is not None or self._ended.all():
            self._read_flags(wait=True)

    def _read_flags(self, wait: bool = False) -> None:
        """Read which rows are finite, as far as it is known."""
        while self._flags and (wait or self._flags[0][0] is None or self._flags[0][0].query()):
            event, flags = self._flags.pop(0)
            if event is not None:
                event.synchronize()
            new = [row for row in np.flatnonzero(~flags.numpy()).tolist() if row not in self._failed]
            if new:
                self._failed.update(dict.fromkeys(new, NOT_FINITE))
                self._runner.reset(new, counts=False)


def _parts(model) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return preprocessor and encoder of a model, or of the pair of them."""
    if isinstance(model, (tuple, list)) and len(model) == 2:
        return tuple(model)
    if not hasattr(model, 'preprocessor') or not hasattr(model, 'encoder'):
        raise ValueError(f"{type(model).__name__} has no preprocessor and encoder; give such a model, or the pair")
    return model.preprocessor, model.encoder


def _check_eval_mode(*modules: torch.nn.Module) -> None:
    if any(module.training for module in modules):
        raise ValueError("the model is in training mode; call model.eval() before streaming")
