# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of encoder frames that come a few at a time, by a CTC, RNNT or hybrid model.

Shapes: B streams, R rows of them, D the encoder's width, A attention frames, C classes, H codebooks.
"""

from typing import NamedTuple

import numpy as np
import torch

from nemo.collections.asr.parts.utils.rnnt_utils import Hypothesis

NO_CONFIDENCE = float('nan')


def decoder_of(model) -> torch.nn.Module:
    """Return the decoder that takes encoder frames alone: that of the model's own forward.

    It is the first next-token decoder of a model that predicts nothing else, and the CTC decoder of a hybrid model.

    Raises:
        ValueError: if the model has no such decoder.
    """
    predictor = getattr(model, 'objectives', model)
    decoder = getattr(predictor, 'ctc_decoder', None) or getattr(predictor, 'decoder', None)
    if 'encoder_output' not in (getattr(decoder, 'input_types', None) or {}):
        raise ValueError(
            f"log-probabilities and tokens need a decoder that takes encoder_output; {type(model).__name__} has none"
        )
    return decoder


def decode_frames(decoder: torch.nn.Module, encoded: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [B, A, C] or [B, A, C, H] of frames [B, D, A], of which there may be none."""
    if encoded.shape[2]:
        return decoder(encoder_output=encoded)
    # a convolution takes no empty input; the classes are the same for any frame
    return decoder(encoder_output=encoded.new_zeros(*encoded.shape[:2], 1))[:, :0]


class Token(NamedTuple):
    """A token of greedy decoding."""

    token: int
    frame: int
    """Attention frame of the stream."""
    confidence: float = NO_CONFIDENCE
    """Of the token in this frame."""
    repeats: bool = False
    """Whether a CTC path repeats the token of the frame before."""


class GreedyCTC:
    """Greedy CTC decoding with NeMo's ``decoding``; the memory of a stream is the class of its last frame."""

    memory = int

    def __init__(self, model, decoding, confidence: bool):
        self.decoder, self.decoding = decoder_of(model), decoding
        self.blank = self.decoder.num_classes_with_blank - 1
        self._confidence = decoding.decoding._get_confidence_tensor if confidence else None

    def decode(self, encoded, counts: list[int], memory: list, first: list[int], log_probs=None) -> tuple[list, list]:
        """Return the new tokens and the new memory of each row.

        Args:
            encoded: new frames, [R, D, A].
            counts: number of new frames of each row.
            memory: of each row; None at the start of its stream.
            first: position of each row's first new frame.
            log_probs: [R, A, C], where the decoder has run already.
        """
        log_probs = decode_frames(self.decoder, encoded) if log_probs is None else log_probs
        paths = log_probs.argmax(dim=2).cpu().numpy()
        confidence = None if self._confidence is None else self._confidence(log_probs).cpu().numpy()
        found = []
        for row, count in enumerate(counts):
            path, before = paths[row, :count], self.blank if memory[row] is None else memory[row]
            repeats = path == np.concatenate(([before], path[:-1]))
            frames = np.flatnonzero(path != self.blank)
            sure = [NO_CONFIDENCE] * len(frames) if confidence is None else confidence[row, frames].tolist()
            positions: list[int] = (first[row] + frames).tolist()
            found.append([*map(Token, path[frames].tolist(), positions, sure, repeats[frames].tolist())])
        return found, [int(paths[row, count - 1]) for row, count in enumerate(counts)]


class GreedyRNNT:
    """Greedy RNNT and TDT decoding by NeMo; the memory of a stream is a hypothesis with the prediction network's state.

    Raises:
        ValueError: if tokens should have a confidence, and the model's decoding computes none.
    """

    memory = Hypothesis

    def __init__(self, decoding, confidence: bool):
        self.decoding, self._confidence = decoding, confidence
        if confidence and not decoding.preserve_frame_confidence:
            raise ValueError(
                "TextOptions.confidence is true, which needs model.decoding.confidence_cfg.preserve_frame_confidence: "
                "true; use model.change_decoding_strategy"
            )

    def decode(self, encoded, counts: list[int], memory: list, first: list[int], log_probs=None) -> tuple[list, list]:
        """Return the new tokens and the new memory of each row; arguments are those of :meth:`GreedyCTC.decode`."""
        hypotheses = self.decoding.rnnt_decoder_predictions_tensor(
            encoded,
            torch.tensor(counts, device=encoded.device),
            return_hypotheses=True,
            partial_hypotheses=[None if each is None else _continued(each) for each in memory],
        )
        return [*map(self._tokens, hypotheses, first)], [*map(_continued, hypotheses)]

    def _tokens(self, hypothesis: Hypothesis, first: int) -> list[Token]:
        timestamp = hypothesis.timestamp
        frames = [int(frame) for frame in (timestamp['timestep'] if isinstance(timestamp, dict) else timestamp)]
        if hasattr(hypothesis.dec_state, 'decoded_length'):  # label looping counts from the start of the stream
            frames = [frame - first for frame in frames]
        tokens, positions = [int(token) for token in hypothesis.y_sequence], [first + frame for frame in frames]
        if not self._confidence:
            return [*map(Token, tokens, positions)]
        sure = getattr(hypothesis, 'non_blank_step_confidence_precomputed', None)  # NeMo 3.0.0, without blanks
        if sure is None:
            of_frames = hypothesis.frame_confidence
            sure = [of_frames[frame][index - frames.index(frame)] for index, frame in enumerate(frames)]
        return [*map(Token, tokens, positions, map(float, sure))]


def _continued(memory: Hypothesis) -> Hypothesis:
    """Return a hypothesis without tokens that continues another; NeMo adds to the one that it is given."""
    return Hypothesis(0.0, [], timestamp=[], dec_state=memory.dec_state, last_token=memory.last_token)


def greedy_decoding(model, confidence: bool) -> GreedyCTC | GreedyRNNT:
    """Return what decodes a model's frames; a hybrid model decodes as its ``cur_decoder`` is set.

    Raises:
        ValueError: if the model is no recogniser or its decoding is not greedy.
    """
    transducer = getattr(model, 'joint', None) is not None and getattr(model, 'cur_decoder', 'rnnt') == 'rnnt'
    decoding = None if transducer else getattr(model, 'ctc_decoding', None)
    decoding = decoding or getattr(model, 'decoding', None)
    if decoding is None:
        raise ValueError(f"text needs a CTC, RNNT or hybrid model; {type(model).__name__} is none of them")
    strategy = decoding.cfg.get('strategy', 'greedy')
    if strategy not in ('greedy', 'greedy_batch'):
        raise ValueError(f"decoding.strategy is {strategy}; text of live streams needs greedy or greedy_batch")
    return GreedyRNNT(decoding, confidence) if transducer else GreedyCTC(model, decoding, confidence)
