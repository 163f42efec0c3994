# SPDX-License-Identifier: Apache-2.0
"""Measures of streams: time per step, difference to offline, errors and latency of words, surprise.

Shapes: N samples, D the encoder's width, A attention frames.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nemo.collections.asr.metrics.wer import word_error_rate
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.receptive_field import receptive_field
from nemo.collections.asr.parts.att_context.windows import STYLES
from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession
from nemo.collections.asr.parts.streaming.text import decoder_of

SETTLING_SECONDS = 2.0  # at the start of a stream, whose targets are normalised with statistics of little audio
LONGEST_OFFLINE = 300.0  # seconds; the memory of the offline forward grows with the square of the length


@dataclass
class StreamMeasures:
    """What streaming one audio in one context gave."""

    context: list[int]
    seconds: float
    look_ahead_ms: float
    cache_bytes: int = 0
    step_ms: list[float] = field(default_factory=list)
    text: str | None = None  # of a recogniser
    word_latency_ms: list[float] = field(default_factory=list)  # audio after a word's last frame until it was final
    surprise: list[float] = field(default_factory=list)  # nats of each token after the settling seconds
    largest_difference: float | None = None  # of encoder outputs, to the offline forward
    token_agreement: float | None = None  # share of frames with the token of the offline forward


@torch.no_grad()
def measure_stream(
    model: Any, samples: np.ndarray, context: Any = None, step_seconds: float = 0.08, **wanted: Any
) -> StreamMeasures:
    """Stream and measure samples [N] float32, of the model's rate and full scale 1, in steps of seconds.

    Audio of up to 300 s is compared with offline. ``wanted`` are arguments of the session: ``weights``, ``return_text``,
    ``return_surprise``.
    """
    has_tokens = 'encoder_output' in (getattr(getattr(model, 'decoder', None), 'input_types', None) or {})
    session = StreamingSession(model, 1, context, return_tokens=has_tokens, **wanted)
    rate, size = session.sample_rate, max(round(step_seconds * session.sample_rate), 1)
    look_ahead_ms = 1000 * session.look_ahead_samples / rate
    measures, outputs = StreamMeasures(session.att_context.as_list(), len(samples) / rate, look_ahead_ms), list[Any]()
    for start in range(0, len(samples), size):
        piece = torch.from_numpy(samples[start : start + size])[None]
        before = time.perf_counter()
        outputs.append(session.step(piece))
        measures.step_ms.append(1000 * (time.perf_counter() - before))
        received = min(start + size, len(samples)) / rate
        words = outputs[-1].text[0].final_words if session.return_text else []
        measures.word_latency_ms += [1000 * max(received - word.end, 0.0) for word in words]
    measures.cache_bytes = session.cache_bytes_per_stream
    output: Any = StreamingOutput.concatenate([*outputs, session.finish()])
    if session.return_text:
        measures.text = session.transcript().text
    if session.return_surprise:
        normalised = getattr(model, 'target_normalize', None) == 'per_feature'
        settled = round(SETTLING_SECONDS * rate / session.frame_samples) if normalised else 0
        skipped = max(settled - int(output.surprise_start[0]), 0)
        measures.surprise = output.surprise[0, skipped : int(output.surprise_lengths[0])].tolist()
    if measures.seconds <= LONGEST_OFFLINE:
        _compare_with_offline(model, torch.from_numpy(samples)[None].to(output.encoded.device), output, measures)
    return measures


def _compare_with_offline(model: Any, samples: torch.Tensor, output: Any, measures: StreamMeasures) -> None:
    """Add the difference of a stream's joined output from that of the offline forward of samples [1, N]."""
    with model.encoder.using_att_context_size(measures.context):
        length = torch.tensor([samples.shape[1]], device=samples.device)
        features, lengths = model.preprocessor(input_signal=samples, length=length)
        encoded, lengths = model.encoder(audio_signal=features, length=lengths)
    encoded = encoded[:, :, : int(lengths[0])]
    measures.largest_difference = (encoded - output.encoded).abs().max().item()
    if output.tokens is not None:
        tokens = decoder_of(model)(encoder_output=encoded).argmax(dim=2)
        measures.token_agreement = (tokens == output.tokens).float().mean().item()


def summarize_streams(measures: Sequence[StreamMeasures], texts: Sequence[str | None]) -> dict[str, Any]:
    """Return the figures of audio, with transcripts if any, streamed in one context; None without audio."""

    def joined(name: str) -> list[float]:
        return [value for each in measures for value in getattr(each, name)]

    def known(name: str) -> list[float]:
        return [getattr(each, name) for each in measures if getattr(each, name) is not None]

    pairs = [(each.text, text) for each, text in zip(measures, texts, strict=True) if each.text is not None and text]
    rates = [word_error_rate(*map(list, zip(*pairs)), use_cer=use) if pairs else None for use in (False, True)]
    seconds, times, surprise = sum(known('seconds')), joined('step_ms'), joined('surprise')
    return {
        'att_context_size': measures[0].context,
        'seconds': seconds,
        'look_ahead_ms': measures[0].look_ahead_ms,
        'cache_bytes_per_stream': max(known('cache_bytes')),
        'largest_difference': max(known('largest_difference'), default=None),
        'token_agreement': min(known('token_agreement'), default=None),
        **{f'step_ms_p{share}': _quantile(times, share) for share in (50, 95, 100)},
        'real_time_factor': sum(times) / 1000 / seconds if seconds else None,
        **{f'word_latency_ms_p{share}': _quantile(joined('word_latency_ms'), share) for share in (50, 95)},
        'wer': rates[0],
        'cer': rates[1],
        'surprise': float(np.mean(surprise)) if surprise else None,
    }


def _quantile(values: list[float], share: float) -> float | None:
    return float(np.percentile(values, share)) if values else None


def streamable_contexts(model: Any) -> list[list[int]]:
    """Return those contexts of a model's configuration that do not need the whole utterance."""
    encoder = model.encoder
    found = [AttContext.parse(each) for each in encoder.att_context_size_all]
    if encoder.att_context_style in STYLES:
        found = [context for context in found if receptive_field(encoder, context).right != UNLIMITED]
    return [context.as_list() for context in found]
