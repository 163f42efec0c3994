# SPDX-License-Identifier: Apache-2.0
"""Measures of streams: time per step, difference to offline, errors and latency of words, surprise.

Shapes: N samples, D the encoder's width, A attention frames, S target frames.
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
from nemo.collections.asr.parts.streaming.decoding import decoder_of
from nemo.collections.asr.parts.streaming.output import StreamingOutput
from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.streaming.text import TextOptions

SETTLING_SECONDS = 2.0  # at the start of a stream, whose targets are normalised with statistics of little audio
LONGEST_OFFLINE = 300.0  # seconds; the memory of the offline forward grows with the square of the length


@dataclass
class StreamMeasures:
    """What streaming one audio in one context gave."""

    context: list[int]
    seconds: float
    look_ahead_ms: float
    cache_bytes: int
    output: StreamingOutput
    """The joined steps."""
    step_ms: list[float]
    text: str | None = None
    """Of a recogniser."""
    word_latency_ms: list[float] = field(default_factory=list)
    """For each word, how much audio came after its last frame until it was final."""
    surprise: list[float] | None = None
    """Nats of each token after the settling seconds, of a model that predicts next tokens."""
    largest_difference: float | None = None
    """Of encoder outputs, to the offline forward."""
    token_agreement: float | None = None
    """Share of frames with the token of the offline forward."""


def measure_stream(
    model,
    samples: np.ndarray,
    context=None,
    step_seconds: float = 0.08,
    surprise: bool = False,
    weights: str = 'float32',
    text: TextOptions | None = None,
) -> StreamMeasures:
    """Stream samples [N] of the model's rate and full scale 1, and measure it.

    Args:
        model: in eval mode.
        samples: float32.
        context: anything that ``AttContext.parse`` reads; None takes the model's default.
        step_seconds: audio in each step.
        surprise: whether to measure the surprise.
        weights: as of the session.
        text: how text is made; None makes none.
    """
    has_tokens = 'encoder_output' in (getattr(getattr(model, 'decoder', None), 'input_types', None) or {})
    wanted: dict[str, Any] = dict(
        return_tokens=has_tokens, return_text=text or False, return_surprise=surprise, weights=weights
    )
    session = StreamingSession(model, 1, context, **wanted)
    rate, size = session.sample_rate, max(round(step_seconds * session.sample_rate), 1)
    outputs: list[Any] = []
    step_ms, latencies = [], []
    for start in range(0, len(samples), size):
        piece = torch.from_numpy(samples[start : start + size])[None]
        before = time.perf_counter()
        outputs.append(session.step(piece))
        step_ms.append(1000 * (time.perf_counter() - before))
        heard = min(start + size, len(samples)) / rate
        for word in outputs[-1].text[0].final_words if text else ():
            latencies.append(1000 * max(heard - word.end, 0.0))
    cache_bytes = session.cache_bytes_per_stream
    output: Any = StreamingOutput.concatenate([*outputs, session.finish()])
    look_ahead_ms = 1000 * session.look_ahead_samples / rate
    measures = StreamMeasures(
        session.att_context.as_list(), len(samples) / rate, look_ahead_ms, cache_bytes, output, step_ms
    )
    measures.word_latency_ms = latencies
    measures.text = session.transcript().text if text else None
    if surprise:
        normalised = getattr(model, 'target_normalize', None) == 'per_feature'
        settled = round(SETTLING_SECONDS * rate / session.frame_samples) if normalised else 0
        skipped = max(settled - int(output.surprise_start[0]), 0)
        measures.surprise = output.surprise[0, : int(output.surprise_lengths[0])].tolist()[skipped:]
    return measures


@torch.no_grad()
def encode_offline(model, samples: torch.Tensor, context) -> torch.Tensor:
    """Return the encoder's output [1, D, A] for samples [1, N] at once, in one attention context."""
    length = torch.tensor([samples.shape[1]], device=samples.device)
    with model.encoder.using_att_context_size(context):
        features, lengths = model.preprocessor(input_signal=samples, length=length)
        encoded, lengths = model.encoder(audio_signal=features, length=lengths)
    return encoded[:, :, : int(lengths[0])]


@torch.no_grad()
def compare_with_offline(model, samples: np.ndarray, measures: StreamMeasures) -> None:
    """Add the difference of the stream to the offline forward of its samples [N]; nothing for audio over 300 s."""
    if measures.seconds > LONGEST_OFFLINE:
        return
    device = next(model.encoder.parameters()).device
    encoded = encode_offline(model, torch.from_numpy(samples)[None].to(device), measures.context)
    output = measures.output
    if encoded.shape != output.encoded.shape:
        raise RuntimeError(f"streamed {tuple(output.encoded.shape)}, offline {tuple(encoded.shape)}")
    measures.largest_difference = (encoded - output.encoded).abs().max().item()
    if output.tokens is not None:
        tokens = decoder_of(model)(encoder_output=encoded).argmax(dim=2)
        measures.token_agreement = (tokens == output.tokens).float().mean().item()


def summarize_streams(measures: Sequence[StreamMeasures], texts: Sequence[str | None]) -> dict:
    """Return the figures of several audios streamed in one context; None where there is none.

    Args:
        measures: at least one.
        texts: the transcript of each, or None.
    """
    times = [ms for each in measures for ms in each.step_ms]
    latencies = [ms for each in measures for ms in each.word_latency_ms]
    surprise = [nats for each in measures for nats in each.surprise or ()]
    pairs = [(each.text, said) for each, said in zip(measures, texts, strict=True) if each.text is not None and said]
    rates = {
        name: word_error_rate(*map(list, zip(*pairs)), use_cer=name == 'cer') if pairs else None
        for name in ('wer', 'cer')
    }
    seconds = sum(each.seconds for each in measures)
    return {
        'att_context_size': measures[0].context,
        'seconds': seconds,
        'look_ahead_ms': measures[0].look_ahead_ms,
        'cache_bytes_per_stream': max(each.cache_bytes for each in measures),
        'largest_difference': _of_those_there_are(max, [each.largest_difference for each in measures]),
        'token_agreement': _of_those_there_are(min, [each.token_agreement for each in measures]),
        **{f'step_ms_p{share}': _quantile(times, share) for share in (50, 95, 100)},
        'real_time_factor': sum(times) / 1000 / seconds if seconds else None,
        **{f'word_latency_ms_p{share}': _quantile(latencies, share) for share in (50, 95)},
        **rates,
        'surprise': float(np.mean(surprise)) if surprise else None,
    }


def _of_those_there_are(reduce, values: list):
    return reduce((value for value in values if value is not None), default=None)


def _quantile(values: list[float], share: float) -> float | None:
    return float(np.percentile(values, share)) if values else None


def streamable_contexts(model, contexts=None) -> list[list[int]]:
    """Return those of the contexts, by default all of the model's configuration, that do not need the whole utterance."""
    encoder = model.encoder
    found = [AttContext.parse(each) for each in (encoder.att_context_size_all if contexts is None else contexts)]
    if encoder.att_context_style in STYLES:
        found = [context for context in found if receptive_field(encoder, context).right != UNLIMITED]
    return [context.as_list() for context in found]
