# SPDX-License-Identifier: Apache-2.0
"""NeMo's cache-aware pipelines over live streams that equal offline.

A ``StreamingSession`` turns samples into encoder frames; end of utterance, words, ITN and translation stay NeMo's. An error
belongs to its stream: a request that cannot be used gets a :class:`FailedStep`, a stream that lost a piece is closed.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from nemo.collections.asr.inference.pipelines.base_pipeline import BasePipeline, TranscribeStepOutput
from nemo.collections.asr.inference.pipelines.cache_aware_ctc_pipeline import CacheAwareCTCPipeline
from nemo.collections.asr.inference.pipelines.cache_aware_rnnt_pipeline import CacheAwareRNNTPipeline
from nemo.collections.asr.inference.streaming.framing.request import Frame
from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.streaming.text import GreedyRNNT
from nemo.collections.asr.parts.utils.rnnt_utils import Hypothesis
from nemo.utils import logging


@dataclass
class FailedStep(TranscribeStepOutput):
    """The output of a request that could not be used, with the reason; it has no text."""

    error: str = ''


class LiveStreams(BasePipeline):
    """Slots of a session, in the precision of the weights, in the place of feature buffers and caches.

    Raises:
        ValueError: if the model cannot stream, with the reason; if ``streaming.request_type`` is not ``frame``.
    """

    def __init__(self, cfg, asr_model, itn_model=None, nmt_model=None):
        super().__init__(cfg, asr_model, itn_model, nmt_model)
        if cfg.streaming.request_type != 'frame':
            raise ValueError(f"streaming.request_type is {cfg.streaming.request_type!r}; live pipelines need 'frame'")
        if getattr(self, 'prompt_enabled', False):
            raise ValueError("streaming.live is true; models with prompts need NeMo's own pipeline: false")
        model, context = asr_model.asr_model, cfg.streaming.att_context_size
        is_ctc = isinstance(self, CacheAwareCTCPipeline)
        self.session = StreamingSession(model, self.num_slots, context, return_log_probs=is_ctc)
        self._slot_of: dict[int, int] = {}
        self._free = [*range(self.num_slots)]

    def init_context_manager(self) -> None:
        """Leave NeMo's caches out: the session has its own."""

    def init_bufferer_for_cache_aware_streaming(self) -> None:
        """Leave NeMo's feature buffers out: the session has its own."""

    def reset_session(self) -> None:
        """Forget all streams."""
        self.delete_states([*self._slot_of])
        super().reset_session()

    def delete_state(self, stream_id: int) -> None:
        """Forget a stream and free its slot."""
        super().delete_state(stream_id)
        slot = self._slot_of.pop(stream_id, None)
        if slot is not None:
            self.session.reset([slot])
            self._free.append(slot)

    def transcribe_step(self, requests) -> list[TranscribeStepOutput]:
        """Take a piece of some streams; return an output, or a :class:`FailedStep`, for each."""
        usable: dict[int, Frame] = {}  # by stream
        failed: dict[int, FailedStep] = {}  # by place
        self._lost: dict[int, str] = {}  # streams whose output is not finite, with the reason
        for index, request in enumerate(requests):
            try:
                self._admit(request, usable)
                usable[request.stream_id] = request
            except Exception as error:  # whatever a client sends, the others continue
                failed[index] = _failed(request, error)
        try:
            outputs = super().transcribe_step([*usable.values()]) if usable else []
        except BaseException:
            self.delete_states(usable)  # none is whole
            raise
        made = {output.stream_id: output for output in outputs}
        for name, reason in self._lost.items():
            made[name] = _failed(usable[name], f"stream {name}: {reason}")
            self.delete_state(name)
        return [failed.get(index) or made[request.stream_id] for index, request in enumerate(requests)]

    def _admit(self, request, taken: Collection[int]) -> None:
        """Check a request and open its stream; raise the reason, and close a stream that loses a piece."""
        if not isinstance(request, Frame):
            raise ValueError(f"a request is a {type(request).__name__}; live pipelines take a Frame of samples")
        name, is_open = request.stream_id, request.stream_id in self._slot_of
        if name in taken:
            raise ValueError(f"stream {name} has another piece in this step")
        if request.is_first == is_open:
            now = 'open' if is_open else 'not open'
            raise ValueError(f"is_first is {request.is_first}, but stream {name} is {now}")
        if not is_open and not self._free:
            raise ValueError(f"stream {name} has no slot: streaming.num_slots is {self.num_slots}, and all are in use")
        try:
            _check_samples(request)
            if not is_open:
                self.init_state(name, request.options)
                self._slot_of[name] = self._free.pop()
        except Exception:
            self.delete_state(name)
            raise

    def transcribe_step_for_frames(self, frames: list[Frame]) -> None:
        """Run the session on unpadded samples of some streams, and update their states and texts."""
        by_slot = {self._slot_of[frame.stream_id]: frame for frame in frames}
        samples = torch.zeros(self.num_slots, max(frame.valid_size for frame in frames))
        lengths, ended = [0] * self.num_slots, [False] * self.num_slots
        for slot, frame in by_slot.items():
            samples[slot, : frame.valid_size] = frame.samples[: frame.valid_size]
            lengths[slot], ended[slot] = frame.valid_size, frame.is_last
        output = self.session.step(samples, lengths, ended)
        failed = {slot: reason for slot, reason in output.failed.items() if slot in by_slot}
        self._lost = {by_slot.pop(slot).stream_id: reason for slot, reason in failed.items()}
        counts, ready = output.lengths.tolist(), []
        new = {slot: frame for slot, frame in by_slot.items() if counts[slot] or frame.is_last}
        for (slot, frame), decoded in zip(new.items(), self._decode(new, counts, output)):
            state = self.get_state(frame.stream_id)
            self.tokens_per_frame = counts[slot]  # of this step; NeMo's steps have as many each
            if self.run_greedy_decoder(state, frame, decoded):
                self.bpe_decoder.decode_bpe_tokens(state)
                state.cleanup_after_eou()
                ready.append(state)
        if ready:
            self.text_processor.process(ready)
        self.update_partial_transcript([*by_slot.values()], self.tokenizer, self.leading_regex_pattern)


def _check_samples(frame: Frame) -> None:
    """Raise ValueError if the samples of a request cannot be used."""
    samples, name = frame.samples, f"samples of stream {frame.stream_id}"
    if not isinstance(samples, torch.Tensor) or samples.dim() != 1 or not samples.is_floating_point():
        kind = (samples.dtype, list(samples.shape)) if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise ValueError(f"{name} are {kind}; they must be a floating point tensor [n], with full scale at 1")
    if not 0 <= frame.valid_size <= frame.size:
        raise ValueError(f"length of stream {frame.stream_id} is {frame.length}; there are {frame.size} samples")
    if not bool(torch.isfinite(samples[: frame.valid_size]).all()):
        raise ValueError(f"{name} have NaN or infinite values")


def _failed(request, error: Exception | str) -> FailedStep:
    logging.warning(f"a request failed: {error}")
    return FailedStep(getattr(request, 'stream_id', None), final_segments=[], error=str(error))


class LiveCTCPipeline(LiveStreams, CacheAwareCTCPipeline):
    """NeMo's pipeline of CTC models, and of hybrid ones, over live streams."""

    def _decode(self, new: dict[int, Frame], counts: list[int], output) -> list[torch.Tensor]:
        return [output.log_probs[slot, : counts[slot]] for slot in new]


class LiveRNNTPipeline(LiveStreams, CacheAwareRNNTPipeline):
    """NeMo's pipeline of RNNT models, and of hybrid ones, over live streams."""

    def _decode(self, new: dict[int, Frame], counts: list[int], output) -> list[Hypothesis]:
        """Return the tokens of new frames, with their frames in this step."""
        found = {slot: Hypothesis(0.0, [], timestamp=[]) for slot in new}
        if slots := [slot for slot in new if counts[slot]]:
            decoding = self.asr_model.asr_model.decoding
            greedy = GreedyRNNT(decoding, decoding.preserve_frame_confidence)
            states = self.get_states(new[slot].stream_id for slot in slots)
            memory, first = zip(*((state.get_previous_hypothesis(), state.global_offset) for state in states))
            decoded = greedy.decode(output.encoded[slots], [counts[slot] for slot in slots], memory, first)
            for slot, state, tokens, remembered in zip(slots, states, *decoded):
                state.set_previous_hypothesis(remembered)
                found[slot].y_sequence = [each.token for each in tokens]
                found[slot].timestamp = [each.frame - state.global_offset for each in tokens]
                if decoding.preserve_frame_confidence:
                    found[slot].non_blank_step_confidence_precomputed = [each.confidence for each in tokens]
        return [*found.values()]

    def run_greedy_decoder(self, state, request: Frame, hypothesis: Hypothesis) -> bool:
        """Add the tokens of new frames; returns whether the utterance has ended."""
        state.set_offset(0)  # NeMo's hypotheses hold earlier tokens, too
        ended = super().run_greedy_decoder(state, request, hypothesis)
        state.increment_global_offset(self.tokens_per_frame)
        return ended
