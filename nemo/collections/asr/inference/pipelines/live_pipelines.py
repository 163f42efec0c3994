# SPDX-License-Identifier: Apache-2.0
"""NeMo's cache-aware pipelines over live streams that equal offline.

A ``StreamingSession`` turns samples into encoder frames; end of utterance, words, ITN and translation stay NeMo's. An error
belongs to its stream: a request that cannot be used gets a :class:`FailedStep`, a stream that lost a piece is closed.
"""

from dataclasses import dataclass

import torch

from nemo.collections.asr.inference.pipelines.base_pipeline import TranscribeStepOutput
from nemo.collections.asr.inference.pipelines.cache_aware_ctc_pipeline import CacheAwareCTCPipeline
from nemo.collections.asr.inference.pipelines.cache_aware_rnnt_pipeline import CacheAwareRNNTPipeline
from nemo.collections.asr.inference.streaming.framing.request import Frame
from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.streaming.text import GreedyRNNT
from nemo.utils import logging


@dataclass
class FailedStep(TranscribeStepOutput):
    """The output of a request that could not be used, with the reason; it has no text."""

    error: str = ''


class LiveStreams:
    """Slots of a session, in the precision of the weights, in the place of feature buffers and caches.

    Raises:
        ValueError: if the model cannot stream, with the reason; if ``streaming.request_type`` is not ``frame``.
    """

    return_log_probs = False

    def __init__(self, cfg, asr_model, itn_model=None, nmt_model=None):
        super().__init__(cfg, asr_model, itn_model, nmt_model)
        if cfg.streaming.request_type != 'frame':
            raise ValueError(f"streaming.request_type is {cfg.streaming.request_type!r}; live pipelines need 'frame'")
        if getattr(self, 'prompt_enabled', False):
            raise ValueError("streaming.live is true; models with prompts need NeMo's own pipeline: false")
        model, context = asr_model.asr_model, cfg.streaming.att_context_size
        self.session = StreamingSession(model, self.num_slots, context, return_log_probs=self.return_log_probs)
        self._lost: dict = {}  # streams whose output is not finite, with the reason
        self._free_slots()

    def init_context_manager(self) -> None:
        """Leave NeMo's caches out: the session has its own."""

    def init_bufferer_for_cache_aware_streaming(self) -> None:
        """Leave NeMo's feature buffers out: the session has its own."""

    def _free_slots(self) -> None:
        self._slot_of, self._free = {}, list(range(self.num_slots))[::-1]
        self._frames = [0] * self.num_slots  # that each slot's stream has given out

    def reset_session(self) -> None:
        """Forget all streams."""
        super().reset_session()
        if self._slot_of:
            self.session.reset()
        self._free_slots()

    def delete_state(self, stream_id: int) -> None:
        """Forget a stream and free its slot."""
        super().delete_state(stream_id)
        slot = self._slot_of.pop(stream_id, None)
        if slot is not None:
            self.session.reset([slot])
            self._frames[slot] = 0
            self._free.append(slot)

    def transcribe_step(self, requests) -> list[TranscribeStepOutput]:
        """Take a piece of some streams; returns one output for each, a :class:`FailedStep` where it cannot be used."""
        outputs, usable, seen = [None] * len(requests), [], set()
        for index, request in enumerate(requests):
            try:
                self._admit(request, seen)
                usable.append(index)
            except Exception as error:  # whatever a client sends, the others continue
                outputs[index] = _failed(request, error)
        try:
            made = super().transcribe_step([requests[index] for index in usable]) if usable else []
        except BaseException:
            self.delete_states([requests[index].stream_id for index in usable])  # none is whole
            raise
        for index, output in zip(usable, made):
            name, outputs[index] = output.stream_id, output
            if name in self._lost:
                outputs[index] = _failed(requests[index], f"stream {name}: {self._lost[name]}")
                self.delete_state(name)
        return outputs

    def _admit(self, request, seen: set) -> None:
        """Check a request and open its stream; raise the reason if it cannot be used, and close a stream that loses a piece."""
        if not isinstance(request, Frame):
            raise ValueError(f"a request is a {type(request).__name__}; live pipelines take a Frame of samples")
        name, is_open = request.stream_id, request.stream_id in self._slot_of
        if name in seen:
            raise ValueError(f"stream {name} has another piece in this step")
        seen.add(name)
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

    def transcribe_step_for_frames(self, frames) -> None:
        """Run the session on the samples of some streams, without their padding, and update their states and texts."""
        slots = [self._slot_of[frame.stream_id] for frame in frames]
        samples = torch.zeros(self.num_slots, max(frame.valid_size for frame in frames))
        lengths, ended = [0] * self.num_slots, [False] * self.num_slots
        for slot, frame in zip(slots, frames):
            samples[slot, : frame.valid_size] = frame.samples[: frame.valid_size]
            lengths[slot], ended[slot] = frame.valid_size, frame.is_last
        output = self.session.step(samples, lengths, ended)
        failed, counts = output.failed, output.lengths.tolist()
        self._lost = {frame.stream_id: failed[slot] for slot, frame in zip(slots, frames) if slot in failed}
        frames = [frame for frame in frames if frame.stream_id not in self._lost]
        slots = [slot for slot in slots if slot not in failed]
        ready = self._take(frames, slots, [counts[slot] for slot in slots], output)
        for slot in slots:
            self._frames[slot] += counts[slot]
        if ready:
            self.text_processor.process(ready)
        self.update_partial_transcript(frames, self.tokenizer, self.leading_regex_pattern)


def _check_samples(frame: Frame) -> None:
    """Raise ValueError if the samples of a request cannot be used."""
    samples, name = frame.samples, f"samples of stream {frame.stream_id}"
    if not isinstance(samples, torch.Tensor) or samples.dim() != 1 or not samples.is_floating_point():
        kind = (samples.dtype, list(samples.shape)) if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise ValueError(f"{name} are {kind}; they must be a floating point tensor [n], with full scale at 1")
    if not 0 <= frame.valid_size <= frame.size:
        raise ValueError(f"length of stream {frame.stream_id} is {frame.length}; there are {frame.size} samples")
    if not bool(torch.isfinite(samples[: frame.valid_size]).all()):
        raise ValueError(f"{name} hold NaN or infinite values")


def _failed(request, error: Exception | str) -> FailedStep:
    logging.warning(f"a request failed: {error}")
    return FailedStep(getattr(request, 'stream_id', None), final_segments=[], error=str(error))


class LiveCTCPipeline(LiveStreams, CacheAwareCTCPipeline):
    """NeMo's pipeline of CTC models, and of hybrid ones, over live streams."""

    return_log_probs = True

    def _take(self, frames, slots: list[int], counts: list[int], output) -> list:
        """Decode the new frames of some streams; returns the states whose utterance has ended."""
        ready = set()
        for frame, slot, count in zip(frames, slots, counts):
            if count or frame.is_last:
                self.decode_log_probs([frame], output.log_probs[slot : slot + 1, :count], None, ready)
                # NeMo counts on as many frames in each step
                self.get_state(frame.stream_id).increment_global_offset(count - self.tokens_per_frame)
        return self.get_states(ready)


class LiveRNNTPipeline(LiveStreams, CacheAwareRNNTPipeline):
    """NeMo's pipeline of RNNT models, and of hybrid ones, over live streams."""

    def __init__(self, cfg, asr_model, itn_model=None, nmt_model=None):
        super().__init__(cfg, asr_model, itn_model, nmt_model)
        decoding = asr_model.asr_model.decoding
        self._greedy = GreedyRNNT(decoding, decoding.preserve_frame_confidence)

    def _take(self, frames, slots: list[int], counts: list[int], output) -> list:
        """Decode the new frames of some streams; returns the states whose utterance has ended."""
        states, ready = self.get_states(frame.stream_id for frame in frames), []
        tokens: list = [()] * len(frames)
        if rows := [row for row, count in enumerate(counts) if count]:
            some = [slots[row] for row in rows]
            memory, first = (
                [states[row].get_previous_hypothesis() for row in rows],
                [self._frames[slot] for slot in some],
            )
            new = self._greedy.decode(output.encoded[some], [counts[row] for row in rows], memory, first)
            for row, found, hypothesis in zip(rows, *new):
                tokens[row] = found
                states[row].set_previous_hypothesis(hypothesis)
        for frame, slot, *each in zip(frames, slots, states, tokens, counts):
            if self._add(frame, *each, self._frames[slot]):
                self.bpe_decoder.decode_bpe_tokens(each[0])
                each[0].cleanup_after_eou()
                ready.append(each[0])
        return ready

    def _add(self, frame: Frame, state, tokens, count: int, first: int) -> bool:
        """Add the tokens of ``count`` new frames from frame ``first`` on; returns whether the utterance has ended."""
        ended, labels = frame.is_last, [self.blank_id] * count
        for each in tokens:
            labels[each.frame - first] = each.token
        state.update_label_buffer(labels)
        if count and not ended:
            emitted, limit = state.get_label_buffer(), state.options.stop_history_eou
            ended, _ = self.endpointer.detect_eou_near_pivot(emitted, len(emitted) - 1, stop_history_eou=limit)
        confidences = [0.0 if each.confidence != each.confidence else each.confidence for each in tokens]
        new = {'tokens': [each.token for each in tokens], 'timesteps': [each.frame for each in tokens]}
        state.update_state({**new, 'confidences': confidences}, eou_detected=ended)
        return ended
