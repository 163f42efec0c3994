# SPDX-License-Identifier: Apache-2.0
"""Live streaming from raw samples, equal to offline.

::

    session = StreamingSession(model, att_context_size=[40, 0], return_log_probs=True)
    for samples in microphone:                          # [1, n], any n
        output = session.step(samples)                  # output.encoded [1, D, frames], usually 0 or 1 frames
    output = session.finish()

Shapes: B streams, N samples, F features, T feature frames, M mask frames, D the encoder's width, A attention frames,
S target frames, K horizons, C classes, H codebooks.
"""

from collections.abc import Sequence

import numpy as np
import torch

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.streaming.batched import BatchedStreams
from nemo.collections.asr.parts.streaming.decoding import decode_frames, decoder_of
from nemo.collections.asr.parts.streaming.encoder import StreamingEncoder
from nemo.collections.asr.parts.streaming.features import StreamingFeatures
from nemo.collections.asr.parts.streaming.linear import check_precision
from nemo.collections.asr.parts.streaming.masking import LiveMasking
from nemo.collections.asr.parts.streaming.one_by_one import OneByOne
from nemo.collections.asr.parts.streaming.output import StreamingOutput, valid_frames
from nemo.collections.asr.parts.streaming.surprise import LiveSurprise
from nemo.collections.asr.parts.streaming.targets import LiveTargets
from nemo.collections.asr.parts.streaming.text import LiveText, TextOptions
from nemo.collections.asr.parts.streaming.together import Together
from nemo.collections.asr.parts.streaming.words import Transcript

FAST = ('auto', 'off')


class StreamingSession:
    """A batch of live streams through a model, in one attention context. All state is here, none in the model.

    Fed in any pieces, the joined output equals the offline forward of the same samples. Sessions of one model may run in
    several threads at once (not with ``fast='off'``). The model must be in eval mode.

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
        return_text: whether to decode the text of each stream, with a CTC, RNNT or hybrid model; ``TextOptions`` set how.
        fast: 'auto' runs all streams as one batch, with cached keys and values and weights arranged for it (which all
            sessions of the encoder share); 'off' runs NeMo's own layers, as does 'auto' where ``why_not_fast`` says why.
        weights: what the layers' weights are held in, on a CPU: 'float32'; 'bfloat16' and 'int8' are smaller and faster, and
            no longer equal to offline.

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
        fast: str = 'auto',
        return_text: bool | TextOptions = False,
        weights: str = 'float32',
    ):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be 1 stream or more")
        preprocessor, encoder = _parts(model)
        self.batch_size = batch_size
        self._model, self._modules = model, (preprocessor, encoder)
        self._masks_frames = getattr(model, 'pre_encoder', None) is not None
        if fast not in FAST:
            raise ValueError(f"fast is {fast!r}; it must be one of {FAST}")
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
        self._text = None
        if return_text:
            options = TextOptions() if return_text is True else return_text
            self._text = LiveText(model, batch_size, self.frame_samples / self.sample_rate, options)
        self.why_not_fast = self._why_not_fast(fast)
        check_precision(weights, next(encoder.parameters()))
        if weights != 'float32' and self.why_not_fast is not None:
            raise ValueError(
                f"weights is {weights!r}, which needs streams that run as one batch; but {self.why_not_fast}"
            )
        self._way = self._new_way(weights)
        self._ended = np.zeros(batch_size, bool)

    def _new_way(self, weights: str) -> Together | OneByOne:
        if self.why_not_fast is None:
            return Together(BatchedStreams(self._front_end, self._encoder, self.batch_size, weights))
        watching = self._masking, self._surprise, self._targets
        return OneByOne(self._front_end, self._encoder, self.batch_size, *watching)

    def _why_not_fast(self, fast: str) -> str | None:
        if fast == 'off':
            return "fast is 'off'"
        if self._targets is not None:
            return 'apply_mask and return_surprise look at each stream by itself'
        return BatchedStreams.why_not(self._front_end, self._encoder)

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
    def next_token_offset(self) -> int | None:
        """How many tokens after its own a frame predicts at the first horizon; None without ``return_surprise``."""
        return None if self._surprise is None else self._surprise.offset

    @property
    def cache_bytes_per_stream(self) -> int:
        """Bytes of state now, per stream; they grow only where the left context is unlimited."""
        return self._way.state(self._ended.tolist()).bytes() // self.batch_size

    @property
    def current_frame(self) -> torch.Tensor:
        """Mask frames received so far by each stream, [B] int64; see ``StreamingOutput.current_frame``."""
        return self._way.received(self._masks_frames, self._ended)

    @property
    def ended(self) -> tuple[bool, ...]:
        """For each stream, whether it has ended."""
        return tuple(self._ended.tolist())

    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Begin anew; all streams, or those with these indices while the others go on.

        Raises:
            ValueError: if an index is out of range.
        """
        if streams is None:
            self._ended = np.zeros(self.batch_size, bool)
            self._way.reset()
            if self._text is not None:
                self._text.reset()
            return
        for row in streams:
            if not 0 <= row < self.batch_size:
                raise ValueError(f"reset: there is no stream {row}; the session has {self.batch_size}")
            self._ended[row] = False
        self._way.forget(list(streams))
        if self._text is not None:
            self._text.reset(list(streams))

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
        self._check_finite(samples, lengths)
        return self._advance(samples, lengths, ends)

    def finish(self) -> StreamingOutput:
        """End all streams and give out what is left of them, as the offline forward would see it.

        Raises:
            ValueError: if all of them have ended already.
        """
        self._check_eval_mode()
        if self._ended.all():
            raise ValueError("finish: every stream has ended already; reset() begins anew")
        nothing = torch.zeros(self.batch_size, 0, device=self._front_end.device)
        return self._advance(nothing, np.zeros(self.batch_size, np.int64), ~self._ended)

    def transcript(self, row: int = 0) -> Transcript:
        """Return the whole text of a stream; its cost grows with the stream.

        Raises:
            ValueError: without ``return_text``.
        """
        if self._text is None:
            raise ValueError("transcript: the session has no text; set return_text=True")
        return self._text.transcript(row)

    def state_dict(self) -> dict:
        """Return a copy of all state: plain containers and tensors, for torch.save or pickle."""
        text = {} if self._text is None else {'text': [self._text.export(row) for row in range(self.batch_size)]}
        return {'settings': self._settings(), **self._way.state(self._ended.tolist()).to_dict(), **text}

    def load_state_dict(self, state: dict) -> None:
        """Go on where another session on the same model was.

        Raises:
            ValueError: if it comes from a session with other settings, or is no such state.
        """
        if not isinstance(state, dict) or 'settings' not in state:
            raise ValueError("load_state_dict: this is no state of a StreamingSession")
        mine, theirs = self._settings(), state['settings']
        theirs = {'return_surprise': False, 'return_text': False, **theirs}  # these came later
        other = [name for name in mine if mine[name] != theirs.get(name)]
        if other:
            raise ValueError(
                "load_state_dict: the state comes from a session with another "
                + ', '.join(f'{name} ({theirs.get(name)}, here {mine[name]})' for name in other)
            )
        self._ended = np.array(self._way.load(state), bool)
        if self._text is not None:
            for row, text in enumerate(state['text']):
                self._text.load(row, text)

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
            'return_text': self._text is not None,
        }

    def _check_eval_mode(self) -> None:
        if any(module.training for module in self._modules):
            raise ValueError("the model is in training mode; call model.eval() before streaming")

    def _checked(self, samples) -> torch.Tensor:
        if not isinstance(samples, torch.Tensor) or samples.dim() != 2 or samples.shape[0] != self.batch_size:
            what = tuple(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
            raise ValueError(f"samples are {what}; they must be a tensor [{self.batch_size}, n]")
        if not samples.is_floating_point():
            raise ValueError(f"samples are {samples.dtype}; they must be floating point, with full scale at 1")
        return samples.to(dtype=torch.float32)

    def _check_finite(self, samples: torch.Tensor, lengths: np.ndarray) -> None:
        """Look at the samples where they came from: those of a host's microphone do not make a device wait."""
        if samples.device.type == 'cpu':  # NumPy takes a quarter of the time of torch for so few
            finite = bool(np.isfinite(samples.detach().numpy()).all())
        else:
            finite = bool(torch.isfinite(samples).all())
        if finite:
            return
        for row, length in enumerate(lengths.tolist()):
            if not bool(torch.isfinite(samples[row, :length]).all()):
                raise ValueError(f"samples of stream {row} hold NaN or infinite values")

    def _checked_lengths(self, lengths, available: int) -> np.ndarray:
        ended = self._ended
        if lengths is None:
            if not ended.any():
                return np.full(self.batch_size, available)
            if ended.all():
                raise ValueError("step: every stream has ended; reset() begins anew")
            return np.where(ended, 0, available)
        lengths = np.array(_row_values(lengths, self.batch_size, 'lengths')).astype(np.int64)
        wrong = np.flatnonzero((lengths < 0) | (lengths > available))
        if len(wrong):
            row = wrong[0]
            raise ValueError(f"lengths[{row}] is {lengths[row]}; it must be from 0 to the {available} samples given")
        late = np.flatnonzero((lengths > 0) & ended)
        if len(late):
            raise ValueError(f"step: stream {late[0]} has ended; reset([{late[0]}]) begins it anew")
        return lengths

    def _checked_ends(self, ended) -> np.ndarray:
        if ended is None:
            return np.zeros(self.batch_size, bool)
        return np.array(_row_values(ended, self.batch_size, 'ended')).astype(bool) & ~self._ended

    def _advance(self, samples: torch.Tensor, lengths: np.ndarray, ends: np.ndarray) -> StreamingOutput:
        with torch.inference_mode():
            if self.why_not_fast is None:
                output = self._way.advance(samples, lengths, ends, self.return_features)
                self._predict(output)
            else:
                samples = samples.to(self._front_end.device)
                output = self._way.advance(
                    samples, lengths.tolist(), ends.tolist(), self.return_features, self._predict
                )
        self._ended = self._ended | ends
        if self._text is not None:
            with torch.inference_mode():
                lengths = output.lengths.tolist()
                output.text = self._text.take(output.encoded, lengths, self._ended.tolist(), output.log_probs)
        output.current_frame = self.current_frame
        if not self.return_log_probs:
            output.log_probs = None
        # tensors made in inference mode could not be used in training
        for name, value in vars(output).items():
            if isinstance(value, torch.Tensor) and value.is_inference():
                setattr(output, name, value.clone())
        return output

    def _predict(self, output: StreamingOutput) -> None:
        """Run the decoder, which takes each frame by itself."""
        if self._decoder is None:
            return
        output.log_probs = decode_frames(self._decoder, output.encoded)
        valid = valid_frames(output)
        shape = valid.shape + (1,) * (output.log_probs.dim() - 2)
        output.log_probs = output.log_probs * valid.view(shape)
        if self.return_tokens:
            output.tokens = output.log_probs.argmax(dim=2)


def _parts(model) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return preprocessor and encoder of a model, or of the pair of them."""
    if isinstance(model, (tuple, list)) and len(model) == 2:
        return tuple(model)
    if not hasattr(model, 'preprocessor') or not hasattr(model, 'encoder'):
        raise ValueError(f"{type(model).__name__} has no preprocessor and encoder; give such a model, or the pair")
    return model.preprocessor, model.encoder


def _row_values(values, batch_size: int, name: str) -> list:
    values = values.tolist() if hasattr(values, 'tolist') else list(values)
    if len(values) != batch_size:
        raise ValueError(f"{name} has {len(values)} values; it needs one for each of the {batch_size} streams")
    return values
