# SPDX-License-Identifier: Apache-2.0
"""Stream samples through a model, measure it, and compare the result with the offline forward.

B batch, N samples, D channels of the encoder, T encoder frames, S tokens.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from script_tools import read_audio, sample_rate_of
from tqdm import tqdm

EARLY = 1e-6  # seconds that a token may begin before a whole second by rounding
SETTLING_SECONDS = 2.0  # of a stream, until the running statistics that its tokens are normalised by say something
LONGEST_OFFLINE = 300  # seconds; the offline forward takes memory with the square of the length


@dataclass
class Streamed:
    """What streaming one audio in one context gave."""

    context: list[int]
    look_ahead_ms: float
    cache_bytes: int = 0
    seconds: float = 0.0
    chunk_ms: list[float] = field(default_factory=list)
    """Time of each step."""
    output: object = None
    """The joined ``StreamingOutput``."""
    largest_difference: float | None = None
    """Of encoder outputs, to the offline forward."""
    token_agreement: float | None = None
    """Share of frames with the token of the offline forward."""
    token_seconds: float = 0.08
    """Seconds of audio in a token."""
    settling: float = 0.0
    """Seconds at the beginning that the mean surprise leaves out."""
    word_latencies: list[float] = field(default_factory=list)
    """Of each word, seconds of audio from the end of its last frame until it was certain."""
    recognised: str | None = None
    reference: str | None = None
    """What was said, where that is known."""

    @property
    def text(self) -> str | None:
        """What a recogniser heard; None for other models."""
        return self.recognised

    @property
    def surprise(self) -> np.ndarray | None:
        """Nats of each token that was predicted, [S]; None if the session was not asked for them."""
        if self.output.surprise is None:
            return None
        return self.output.surprise[0, : int(self.output.surprise_lengths[0])].float().cpu().numpy()

    @property
    def surprise_seconds(self) -> np.ndarray:
        """Where in the audio each of these tokens begins, [S]."""
        return (int(self.output.surprise_start[0]) + np.arange(len(self.surprise))) * self.token_seconds

    @property
    def mean_surprise(self) -> float | None:
        """Nats per token once the stream has settled; None if nobody asked, or there is no such token."""
        if self.surprise is None:
            return None
        settled = self.surprise[self.surprise_seconds >= self.settling - EARLY]
        return round(float(settled.mean()), 4) if len(settled) else None

    def figures(self) -> dict:
        """Return what the report says of it; times are in milliseconds."""
        times = sorted(self.chunk_ms)
        return {
            'att_context_size': self.context,
            'frames': int(self.output.lengths[0]),
            'look_ahead_ms': self.look_ahead_ms,
            'cache_bytes_per_stream': self.cache_bytes,
            'chunk_ms_p50': quantile(times, 0.5),
            'chunk_ms_p95': quantile(times, 0.95),
            'chunk_ms_max': quantile(times, 1.0),
            'real_time_factor': round(sum(times) / 1000 / self.seconds, 4) if self.seconds else None,
            'largest_difference': self.largest_difference,
            'token_agreement': self.token_agreement,
            'mean_surprise': self.mean_surprise,
            'text': self.text,
            'word_latency_ms_p50': quantile(sorted(1000 * seconds for seconds in self.word_latencies), 0.5),
            'word_latency_ms_p95': quantile(sorted(1000 * seconds for seconds in self.word_latencies), 0.95),
            **(error_rates([self.text], [self.reference]) if self.text is not None and self.reference else {}),
        }


def error_rates(heard: list[str], said: list[str]) -> dict[str, float]:
    """Return ``wer`` and ``cer``, the word and the character error rate of all texts together, by NeMo's metric."""
    from nemo.collections.asr.metrics.wer import word_error_rate

    rates = {name: word_error_rate(heard, said, use_cer=name == 'cer') for name in ('wer', 'cer')}
    return {name: round(float(rate), 4) for name, rate in rates.items()}


class WordMeter:
    """Says each word of a stream as soon as it will not change any more.

    Args:
        name: what the lines begin with.
        result: gets the latency of each word.
    """

    def __init__(self, name: str, result: Streamed):
        self.name, self.result = name, result

    def take(self, output) -> Iterator[str]:
        """Yield a line for each word that is certain now, given a step's ``StreamingOutput`` of one stream."""
        for word in output.text[0].final_words:
            late = max(self.result.seconds - word.end, 0.0)
            self.result.word_latencies.append(late)
            yield f'{self.name}  {self.result.seconds:6.2f} s  {word.text}  (until {word.end:.2f} s, {1000 * late:.0f} ms ago)'


class SurpriseMeter:
    """Says of each second of a stream how surprising it was, as soon as its tokens are known.

    Args:
        token_seconds: seconds of audio in a token.
        name: what the lines begin with.
        settling: seconds at the beginning that the mean leaves out.
    """

    def __init__(self, token_seconds: float, name: str, settling: float = 0.0):
        self.token_seconds, self.name, self.settling = token_seconds, name, settling
        self._second, self._tokens = 0, []
        self._total, self._count = 0.0, 0

    def take(self, output) -> Iterator[str]:
        """Yield a line for each second that is over, given a step's ``StreamingOutput`` of one stream."""
        first, count = int(output.surprise_start[0]), int(output.surprise_lengths[0])
        for index, nats in enumerate(output.surprise[0, :count].tolist(), start=first):
            begins = index * self.token_seconds + EARLY
            if int(begins) > self._second:
                yield from self.finish()
                self._second = int(begins)
            self._tokens.append(nats)
            if begins >= self.settling:
                self._total, self._count = self._total + nats, self._count + 1

    def finish(self) -> Iterator[str]:
        """Yield the line of the second that has begun, if a token of it is known."""
        if self._tokens:
            now = sum(self._tokens) / len(self._tokens)
            mean = f'mean so far {self._total / self._count:.2f}' if self._count else 'settling'
            yield f'{self.name}  second {self._second}: {now:.2f} nats per token, {mean}'
            self._tokens = []


def settling_seconds(model) -> float:
    """Return for how long a stream's tokens are normalised by statistics of too little audio to be compared."""
    return SETTLING_SECONDS if getattr(model, 'target_normalize', None) == 'per_feature' else 0.0


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of ``width`` values (an odd number) about each of the values [S]; at the ends of those there are."""
    totals = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    index = np.arange(len(values))
    begin, end = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(values))
    return (totals[end] - totals[begin]) / (end - begin)


def quantile(times: list[float], share: float) -> float | None:
    """Return the time that this share of the sorted times stays below; None if there are no times."""
    return round(times[min(int(share * len(times)), len(times) - 1)], 3) if times else None


def has_tokens(model) -> bool:
    """Return whether the model's decoder gives classes for each encoder frame."""
    return 'encoder_output' in (getattr(getattr(model, 'decoder', None), 'input_types', None) or {})


def has_text(model) -> bool:
    """Return whether the model recognises words: whether it has one of NeMo's decodings of CTC or RNNT."""
    return getattr(model, 'decoding', None) is not None


def stream(
    model,
    chunks,
    context=None,
    total: float | None = None,
    name: str = 'stream',
    surprise: bool = False,
    words: bool = True,
    weights: str = 'float32',
) -> Streamed:
    """Stream pieces of samples through the model, with a progress bar in seconds of audio.

    Args:
        model: in eval mode.
        chunks: pieces [1, n].
        context: anything ``AttContext.parse`` reads; None: the model's default.
        total: seconds of all pieces, if known.
        name: on the progress bar.
        surprise: whether to print how surprising each second was to a model that predicts next tokens.
        words: whether to print the words of a recogniser as they come.
        weights: what the weights are held in, as the session has it.
    """
    from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession

    asked = dict(return_tokens=has_tokens(model), return_text=has_text(model))
    asked.update(return_features=True, return_surprise=surprise, weights=weights)
    session = StreamingSession(model, att_context_size=context, **asked)
    result = Streamed(session.att_context.as_list(), 1000 * session.look_ahead_samples / session.sample_rate)
    result.token_seconds = session.frame_samples / session.sample_rate
    result.settling = settling_seconds(model)
    meter = SurpriseMeter(result.token_seconds, name, result.settling) if surprise else None
    words_meter = WordMeter(name, result) if has_text(model) else None
    outputs = []
    with _progress_bar(total, name) as progress:
        for samples in chunks:
            outputs.append(_timed_step(session, samples, result))
            progress.update(samples.shape[1] / session.sample_rate)
            if meter is not None:
                _print_beside_bar(meter.take(outputs[-1]))
            if words_meter is not None:
                _print_beside_bar(words_meter.take(outputs[-1]), words)
            if total is None and words_meter is None:
                _show_last_token(progress, outputs[-1].tokens)
    result.cache_bytes = session.cache_bytes_per_stream
    outputs.append(session.finish())
    if words_meter is not None:
        _print_beside_bar(words_meter.take(outputs[-1]), words)
    if meter is not None:
        _print_beside_bar(meter.take(outputs[-1]))
        _print_beside_bar(meter.finish())
    result.output = StreamingOutput.concatenate(outputs)
    result.recognised = session.transcript().text if has_text(model) else None
    return result


def _progress_bar(total: float | None, name: str) -> tqdm:
    """Return a bar that counts seconds of audio, up to ``total`` if that is known."""
    form = '{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} s'
    if not total:
        form = '{desc}: {n:.1f} s [{elapsed}]{postfix}'
    return tqdm(total=total, desc=name, bar_format=form, mininterval=0.2)


def _print_beside_bar(lines: Iterator[str], shown: bool = True) -> None:
    """Print lines at once, without breaking the progress bar; or only work them out."""
    for line in lines:
        if not shown:
            continue
        tqdm.write(line)
        sys.stdout.flush()


def _timed_step(session, samples: torch.Tensor, result: Streamed):
    """Stream one piece [1, n], note its time and its length in the result, and return the session's output."""
    start = time.perf_counter()
    output = session.step(samples)
    result.chunk_ms.append(1000 * (time.perf_counter() - start))
    result.seconds += samples.shape[1] / session.sample_rate
    return output


def _show_last_token(progress: tqdm, tokens: torch.Tensor | None) -> None:
    """Put the last of the tokens [1, T, ...] on the progress bar, if there are any."""
    if tokens is not None and tokens.shape[1]:
        progress.set_postfix_str(f'token {tokens[0, -1].flatten().tolist()}', refresh=False)


def stream_samples(model, samples: np.ndarray, chunk_size: float, context, name: str, **settings) -> Streamed:
    """Stream samples [N] in steps of ``chunk_size`` seconds; the other arguments are those of :func:`stream`."""
    rate = sample_rate_of(model)
    chunks = _chunks_of(samples, max(round(chunk_size * rate), 1))
    return stream(model, chunks, context, len(samples) / rate, name, **settings)


def _chunks_of(samples: np.ndarray, size: int) -> Iterator[torch.Tensor]:
    """Yield pieces [1, n] of samples [N]."""
    for begin in range(0, len(samples), size):
        yield torch.from_numpy(samples[begin : begin + size]).unsqueeze(0)


@torch.no_grad()
def encode_offline(model, samples: torch.Tensor, context) -> torch.Tensor:
    """Return what the encoder makes of samples [1, N] at once, in one attention context; [1, D, T]."""
    length = torch.tensor([samples.shape[1]], device=samples.device)
    with model.encoder.using_att_context_size(context):
        features, lengths = model.preprocessor(input_signal=samples, length=length)
        encoded, lengths = model.encoder(audio_signal=features, length=lengths)
    return encoded[:, :, : int(lengths[0])]


@torch.no_grad()
def compare_with_offline(model, samples: np.ndarray, streamed: Streamed) -> None:
    """Run the offline forward of samples [N] in the same context, and note how far the streamed outputs are from it."""
    from nemo.collections.asr.parts.streaming.decoding import decoder_of

    if streamed.seconds > LONGEST_OFFLINE:
        print(f'not compared with offline: the audio is longer than {LONGEST_OFFLINE} s', file=sys.stderr)
        return
    device = next(model.encoder.parameters()).device
    encoded = encode_offline(model, torch.from_numpy(samples).unsqueeze(0).to(device), streamed.context)
    if encoded.shape != streamed.output.encoded.shape:
        raise RuntimeError(f'streamed {tuple(streamed.output.encoded.shape)}, offline {tuple(encoded.shape)}: a bug')
    streamed.largest_difference = (encoded - streamed.output.encoded).abs().max().item()
    if streamed.output.tokens is not None:
        tokens = decoder_of(model)(encoder_output=encoded).argmax(dim=2)
        streamed.token_agreement = (tokens == streamed.output.tokens).float().mean().item()


def streamable_contexts(model, contexts=None) -> list[list[int]]:
    """Return those of the contexts, by default of all that the model is configured with, that need no whole utterance."""
    from nemo.collections.asr.parts.att_context.context import UNLIMITED
    from nemo.collections.asr.parts.att_context.receptive_field import receptive_field
    from nemo.collections.asr.parts.att_context.windows import STYLES

    encoder = model.encoder
    contexts = [list(context) for context in (encoder.att_context_size_all if contexts is None else contexts)]
    if encoder.att_context_style not in STYLES:
        return contexts
    return [context for context in contexts if receptive_field(encoder, context).right != UNLIMITED]


def chunk_seconds(model, context) -> float:
    """Return the seconds of audio in a chunk of the attention; of one attention frame where the style has no chunks."""
    from nemo.collections.asr.parts.att_context.context import AttContext
    from nemo.collections.asr.parts.att_context.windows import Window

    window = Window(AttContext(*context), model.encoder.att_context_style)
    featurizer = model.preprocessor.featurizer
    return window.chunk * model.encoder.subsampling_factor * featurizer.hop_length / featurizer.sample_rate


def stream_one(model, audio_path, chunk_size: float = 0.08, context=None) -> Streamed:
    """Stream a file in one context and compare it with offline: for :func:`parity_line`."""
    samples = read_audio(Path(audio_path), sample_rate_of(model))
    streamed = stream_samples(model, samples, chunk_size, context, 'streaming', words=False)
    compare_with_offline(model, samples, streamed)
    return streamed


def parity_line(streamed: Streamed) -> str:
    """Return one line on whether streaming equals offline."""
    figures = streamed.figures()
    tokens = '' if streamed.token_agreement is None else f', {streamed.token_agreement:.2%} of the tokens the same'
    return (
        f"Streamed {streamed.seconds:.1f} s in context {streamed.context}: largest difference to offline "
        f"{streamed.largest_difference:.1e}{tokens}, {figures['chunk_ms_p50']:.1f} ms per chunk (p50), "
        f"real-time factor {figures['real_time_factor']:.3f}"
    )
