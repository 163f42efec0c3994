# SPDX-License-Identifier: Apache-2.0
"""NeMo's cache-aware pipelines over live streams that equal offline.

NeMo's ``CacheAwareCTCPipeline`` and ``CacheAwareRNNTPipeline`` cut features from each piece of audio by itself, without the
model's normalisation, and begin a stream with made-up frames. These take their place: what a pipeline does with tokens
(end of utterance, words, ITN, translation) stays NeMo's; samples become encoder frames in a ``StreamingSession``.

Shapes: B slots, N samples, D the encoder's width, A attention frames, C classes.
"""

import torch

from nemo.collections.asr.inference.pipelines.cache_aware_ctc_pipeline import CacheAwareCTCPipeline
from nemo.collections.asr.inference.pipelines.cache_aware_rnnt_pipeline import CacheAwareRNNTPipeline
from nemo.collections.asr.parts.streaming.session import StreamingSession


class LiveStreams:
    """What the pipelines below have in common: slots of a session in the place of feature buffers and caches.

    Takes what NeMo's pipelines take. The encoder runs in the precision of its weights, whatever ``asr.use_amp``.

    Raises:
        ValueError: if the model cannot stream, with the reason; if ``streaming.request_type`` is not ``frame``.
    """

    return_log_probs = False

    def __init__(self, cfg, asr_model, itn_model=None, nmt_model=None):
        super().__init__(cfg, asr_model, itn_model, nmt_model)
        if cfg.streaming.request_type != 'frame':
            raise ValueError(
                f"streaming.request_type is {cfg.streaming.request_type!r}; live pipelines take samples: 'frame'"
            )
        if getattr(self, 'prompt_enabled', False):
            raise ValueError("streaming.live is on; models with prompts need NeMo's own pipeline: false")
        self.session = StreamingSession(
            asr_model.asr_model,
            self.num_slots,
            cfg.streaming.att_context_size,
            return_log_probs=self.return_log_probs,
        )
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
        """Forget a stream, and give its slot back."""
        super().delete_state(stream_id)
        slot = self._slot_of.pop(stream_id, None)
        if slot is not None:
            self.session.reset([slot])
            self._frames[slot] = 0
            self._free.append(slot)

    def _slots(self, requests) -> list[int]:
        for request in requests:
            if request.stream_id not in self._slot_of:
                if not self._free:
                    raise RuntimeError(f"streaming.num_slots is {self.num_slots}, and as many streams are open")
                self._slot_of[request.stream_id] = self._free.pop()
        return [self._slot_of[request.stream_id] for request in requests]

    def transcribe_step_for_feature_buffers(self, fbuffers) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError("live pipelines take samples (streaming.request_type: frame), not buffers of features")

    def transcribe_step_for_frames(self, frames) -> None:
        """Take a piece of some streams, and update their states and texts.

        Args:
            frames: one of each stream; padding is not heard.
        """
        slots = self._slots(frames)
        samples = torch.zeros(self.num_slots, max(frame.size for frame in frames))
        lengths, ended = [0] * self.num_slots, [False] * self.num_slots
        for slot, frame in zip(slots, frames):
            samples[slot, : frame.size] = frame.samples
            lengths[slot], ended[slot] = frame.valid_size, frame.is_last
        output = self.session.step(samples, lengths, ended)
        counts = output.lengths.tolist()
        ready = self._take(frames, slots, output)
        for slot in slots:
            self._frames[slot] += counts[slot]
        if ready:
            self.text_processor.process(ready)
        self.update_partial_transcript(frames, self.tokenizer, self.leading_regex_pattern)

    def frames_given(self, stream_id: int) -> int:
        """Return how many encoder frames of an open stream there have been."""
        return self._frames[self._slot_of[stream_id]]

    def _take(self, frames, slots: list[int], output) -> list:
        """Decode the new frames of some streams; returns the states whose utterance has ended."""
        raise NotImplementedError


class LiveCTCPipeline(LiveStreams, CacheAwareCTCPipeline):
    """NeMo's pipeline of CTC models, and of hybrid ones, over live streams."""

    return_log_probs = True

    def _take(self, frames, slots: list[int], output) -> list:
        ready = set()
        for frame, slot, count in zip(frames, slots, output.lengths[slots].tolist()):
            if count or frame.is_last:
                self.decode_log_probs([frame], output.log_probs[slot : slot + 1, :count], None, ready)
                # NeMo counts on as many frames in each step
                self.get_state(frame.stream_id).increment_global_offset(count - self.tokens_per_frame)
        return self.get_states(ready)


class LiveRNNTPipeline(LiveStreams, CacheAwareRNNTPipeline):
    """NeMo's pipeline of RNNT models, and of hybrid ones, over live streams."""

    def _take(self, frames, slots: list[int], output) -> list:
        counts = output.lengths[slots]
        some = [row for row, count in enumerate(counts.tolist()) if count]
        states = [self.get_state(frame.stream_id) for frame in frames]
        found = [state.get_previous_hypothesis() for state in states]
        if some:
            encoded = output.encoded[[slots[row] for row in some]]
            with torch.inference_mode():
                hypotheses = self.asr_model.asr_model.decoding.rnnt_decoder_predictions_tensor(
                    encoded, counts[some], return_hypotheses=True, partial_hypotheses=[found[row] for row in some]
                )
            for row, hypothesis in zip(some, hypotheses):
                found[row] = hypothesis
                states[row].set_previous_hypothesis(hypothesis)
        return [
            state
            for frame, slot, state, hypothesis, count in zip(frames, slots, states, found, counts.tolist())
            if self._ends_utterance(frame, slot, state, hypothesis, count)
        ]

    def _ends_utterance(self, frame, slot: int, state, hypothesis, count: int) -> bool:
        """Add what is new in a hypothesis to a stream's state; returns whether its utterance has ended."""
        ended = frame.is_last
        if count:
            ended = self._add(frame, state, hypothesis, count, self._frames[slot])
        if ended:
            self.bpe_decoder.decode_bpe_tokens(state)
            state.cleanup_after_eou()
        return ended

    def _add(self, frame, state, hypothesis, count: int, first: int) -> bool:
        """Add the tokens of ``count`` new frames, the first of which is frame ``first`` of its stream.

        NeMo's ``run_greedy_decoder`` takes it that every step has as many frames, and begins with a multiple of them.
        """
        confidences = getattr(hypothesis, 'non_blank_step_confidence_precomputed', None)  # NeMo 3.0.0, where asked for
        new, labels, offset = self.greedy_rnnt_decoder(
            global_timestamps=hypothesis.timestamp,
            tokens=hypothesis.y_sequence,
            length=count,
            offset=state.offset,
            **({} if confidences is None else {'confidences': confidences}),
        )
        state.set_offset(offset)
        start = first % count  # where the decoder puts frame ``first``
        state.update_label_buffer(labels[start:] + labels[:start])
        ended = frame.is_last
        if not ended:
            emitted = state.get_label_buffer()
            ended, _ = self.endpointer.detect_eou_near_pivot(
                emitted, len(emitted) - 1, stop_history_eou=state.options.stop_history_eou
            )
        state.update_state(new, eou_detected=ended)
        return ended
