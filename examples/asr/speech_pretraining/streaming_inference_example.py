# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Stream audio through a model as it would arrive, and say how long that takes and whether it equals offline.

    python streaming_inference_example.py --model_path model.nemo --audio_path speech.wav --compare_modes
    python streaming_inference_example.py --model_path model.nemo --manifest files.json --report report.json
    arecord -f S16_LE -r 16000 -c 1 -t raw | python streaming_inference_example.py --model_path model.nemo --stdin_pcm

Any NeMo model with a causal Conformer encoder and a preprocessor will do: an SSL model or a fine-tuned CTC model.
Audio of another rate or of several channels is resampled and mixed down. Without --compare_modes it streams in one
context; with it in each of the model's, and runs the offline forward beside it.

Exit status: 0; 1 if some of the manifest's files failed (the others were run); 2 if nothing could be run.
"""

import argparse
import ast
import json
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, Optional

import numpy as np
import soundfile
import torch
from tqdm import tqdm

LONGEST_OFFLINE = 300  # seconds; the offline forward takes memory with the square of the length
UNKNOWN_LENGTH = 0x7FFFF000  # bytes: headers of piped wav files claim this much or more
PCM_BYTES = 2
GREY = '#777777'


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
    largest_difference: Optional[float] = None
    """Of encoder outputs, to the offline forward."""
    token_agreement: Optional[float] = None
    """Share of frames with the token of the offline forward."""

    def figures(self) -> dict:
        """What the report says of it; times in milliseconds."""
        times = sorted(self.chunk_ms)
        pick = (
            (lambda share: round(times[min(int(share * len(times)), len(times) - 1)], 3))
            if times
            else (lambda _: None)
        )
        return {
            'att_context_size': self.context,
            'frames': int(self.output.lengths[0]),
            'look_ahead_ms': self.look_ahead_ms,
            'cache_bytes_per_stream': self.cache_bytes,
            'chunk_ms_p50': pick(0.5),
            'chunk_ms_p95': pick(0.95),
            'chunk_ms_max': pick(1.0),
            'real_time_factor': round(sum(times) / 1000 / self.seconds, 4) if self.seconds else None,
            'largest_difference': self.largest_difference,
            'token_agreement': self.token_agreement,
        }


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0],
        epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument('--model_path', required=True, type=Path, help='a .nemo file')
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--audio_path', type=Path, help='an audio file')
    source.add_argument(
        '--manifest', type=Path, help='a NeMo manifest: a JSON object with audio_filepath in each line'
    )
    source.add_argument('--stdin_pcm', action='store_true', help='signed 16-bit mono PCM from a pipe, until it ends')
    parser.add_argument('--stdin_rate', type=int, help="samples per second of the pipe (the model's rate)")
    parser.add_argument('--chunk_size', type=float, default=0.08, help='seconds of audio in each step (0.08)')
    parser.add_argument(
        '--att_context_size', help='"[left,right]" in attention frames, or a preset (the model\'s first)'
    )
    parser.add_argument(
        '--compare_modes', action='store_true', help="stream in each of the model's contexts, and offline"
    )
    parser.add_argument(
        '--plot', type=Path, help='a PNG file: spectrogram, tokens and time per chunk of the first audio'
    )
    parser.add_argument('--report', type=Path, help='a JSON file for the figures')
    parser.add_argument('--device', default='cpu', help='where the model runs (cpu)')
    options = parser.parse_args(argv)
    if options.stdin_rate is not None and not options.stdin_pcm:
        parser.error('--stdin_rate goes with --stdin_pcm')
    if options.stdin_rate is not None and options.stdin_rate < 1:
        parser.error('--stdin_rate must be 1 or more')
    if not 0 < options.chunk_size < float('inf'):
        parser.error('--chunk_size must be above 0 seconds')
    for name in ('plot', 'report'):
        path = getattr(options, name)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f'--{name} {path}: there is no folder {path.resolve().parent}')
    return options


def read_audio(path: Path, rate: int, offset: float = 0.0, duration: Optional[float] = None) -> np.ndarray:
    """Read a file as mono samples at ``rate``, float32 [N] with full scale at 1.

    Args:
        path: of an audio file of any rate and number of channels.
        rate: samples per second wanted.
        offset, duration: the part to read, in seconds; None: to the end.

    Raises:
        ValueError: naming the file, if it is missing, empty, truncated or no audio.
    """
    if not path.is_file():
        raise ValueError(f'{path}: there is no such file')
    if path.stat().st_size == 0:
        raise ValueError(f'{path}: the file is empty')
    try:
        with soundfile.SoundFile(str(path)) as audio:
            _check_complete(audio)
            audio.seek(min(int(offset * audio.samplerate), audio.frames))
            wanted = audio.frames - audio.tell()
            if duration is not None:
                wanted = min(wanted, int(duration * audio.samplerate))
            samples, own_rate = audio.read(wanted, dtype='float32', always_2d=True), audio.samplerate
    except (soundfile.LibsndfileError, ValueError) as error:
        raise ValueError(f'{path}: cannot be read as audio: {error}') from None
    if len(samples) < wanted:
        raise ValueError(f'{path}: the file is truncated: {len(samples)} of {wanted} samples are there')
    if len(samples) == 0:
        raise ValueError(f'{path}: there are no samples in it')
    if not np.isfinite(samples).all():
        raise ValueError(f'{path}: it holds samples that are not finite')
    return resampled(samples.mean(axis=1), own_rate, rate)


def _check_complete(audio: soundfile.SoundFile) -> None:
    """Raise ValueError if the header promises more than the file holds; libsndfile only notes it in its log."""
    for claimed, there in re.findall(r'^\s*data\s*:\s*(\d+)\s*\(should be (\d+)\)', audio.extra_info, re.MULTILINE):
        if int(there) < int(claimed) < UNKNOWN_LENGTH:
            raise ValueError(f'the file is truncated: {there} of {claimed} bytes of samples are there')


def resampled(samples: np.ndarray, own_rate: int, rate: int) -> np.ndarray:
    """Resample float32 [N]."""
    if own_rate == rate:
        return np.ascontiguousarray(samples)
    import librosa

    return librosa.resample(samples, orig_sr=own_rate, target_sr=rate).astype(np.float32)


def manifest_entries(path: Path) -> Iterator[tuple[str, Optional[dict], Optional[str]]]:
    """Yield name, entry and error of each line of a manifest; one of the last two is None.

    Raises:
        ValueError: if there is no manifest, or nothing in it.
    """
    try:
        lines = [line for line in enumerate(path.read_text().splitlines(), 1) if line[1].strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'manifest {path} cannot be read: {error}') from None
    if not lines:
        raise ValueError(f'manifest {path} has no entries')
    for number, line in lines:
        try:
            entry = json.loads(line)
            audio = Path(entry['audio_filepath'])
            entry = {
                'path': audio if audio.is_absolute() else path.parent / audio,
                'offset': float(entry.get('offset') or 0),
                'duration': None if entry.get('duration') is None else float(entry['duration']),
            }
            yield str(audio), entry, None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            yield f'{path}, line {number}', None, f'{path}, line {number}: no NeMo manifest entry: {error!r}'


def chunks_of(samples: np.ndarray, size: int) -> Iterator[torch.Tensor]:
    """Yield pieces [1, n] of samples [N]."""
    for begin in range(0, len(samples), size):
        yield torch.from_numpy(samples[begin : begin + size]).unsqueeze(0)


def stdin_chunks(stream, own_rate: int, rate: int, seconds: float, heard: list) -> Iterator[torch.Tensor]:
    """Yield pieces [1, n] of 16-bit PCM as they arrive, also kept in ``heard``. Ends with the pipe or Ctrl-C."""
    resampler = None
    if own_rate != rate:
        import soxr

        resampler = soxr.ResampleStream(own_rate, rate, 1, dtype='float32')
    size = max(round(seconds * own_rate), 1) * PCM_BYTES
    ended = False
    while not ended:
        try:
            data = stream.read(size)
        except KeyboardInterrupt:
            data = b''
        ended = len(data) < size
        samples = np.frombuffer(data[: len(data) // PCM_BYTES * PCM_BYTES], dtype='<i2').astype(np.float32) / 32768
        if resampler is not None:
            samples = resampler.resample_chunk(samples, last=ended).astype(np.float32)
        if len(samples):
            heard.append(samples)
            yield torch.from_numpy(samples).unsqueeze(0)


def context_of(text: Optional[str]):
    """Read --att_context_size: a pair, a number or the name of a preset."""
    try:
        return ast.literal_eval(text) if text is not None else None
    except (ValueError, SyntaxError):
        return text


def has_tokens(model) -> bool:
    """Whether the model's decoder gives classes for each encoder frame."""
    return 'encoder_output' in (getattr(getattr(model, 'decoder', None), 'input_types', None) or {})


def stream(model, chunks, context=None, total: Optional[float] = None, name: str = 'stream') -> Streamed:
    """Stream pieces of samples through the model, with a progress bar in seconds of audio.

    Args:
        model: in eval mode.
        chunks: pieces [1, n].
        context: anything ``AttContext.parse`` reads; None: the model's default.
        total: seconds of all pieces, if known.
        name: on the progress bar.
    """
    from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession

    session = StreamingSession(model, att_context_size=context, return_tokens=has_tokens(model), return_features=True)
    result = Streamed(session.att_context.as_list(), 1000 * session.look_ahead_samples / session.sample_rate)
    outputs = []
    bar = (
        '{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} s'
        if total
        else '{desc}: {n:.1f} s [{elapsed}]{postfix}'
    )
    with tqdm(total=total, desc=name, bar_format=bar, mininterval=0.2) as progress:
        for samples in chunks:
            start = time.perf_counter()
            outputs.append(session.step(samples))
            result.chunk_ms.append(1000 * (time.perf_counter() - start))
            result.seconds += samples.shape[1] / session.sample_rate
            progress.update(samples.shape[1] / session.sample_rate)
            if total is None and outputs[-1].tokens is not None and outputs[-1].tokens.shape[1]:
                progress.set_postfix_str(f'token {outputs[-1].tokens[0, -1].flatten().tolist()}', refresh=False)
    result.cache_bytes = session.cache_bytes_per_stream
    outputs.append(session.finish())
    result.output = StreamingOutput.concatenate(outputs)
    return result


@torch.no_grad()
def compare_with_offline(model, samples: np.ndarray, streamed: Streamed) -> None:
    """Run the offline forward in the same context, and note how far the streamed outputs are from it."""
    if streamed.seconds > LONGEST_OFFLINE:
        print(f'not compared with offline: the audio is longer than {LONGEST_OFFLINE} s', file=sys.stderr)
        return
    device = next(model.encoder.parameters()).device
    signal, length = torch.from_numpy(samples).unsqueeze(0).to(device), torch.tensor([len(samples)], device=device)
    with model.encoder.using_att_context_size(streamed.context):
        features, lengths = model.preprocessor(input_signal=signal, length=length)
        encoded, lengths = model.encoder(audio_signal=features, length=lengths)
    encoded = encoded[:, :, : int(lengths[0])]
    if encoded.shape != streamed.output.encoded.shape:
        raise RuntimeError(f'streamed {tuple(streamed.output.encoded.shape)}, offline {tuple(encoded.shape)}: a bug')
    streamed.largest_difference = (encoded - streamed.output.encoded).abs().max().item()
    if streamed.output.tokens is not None:
        tokens = model.decoder(encoder_output=encoded).argmax(dim=2)
        streamed.token_agreement = (tokens == streamed.output.tokens).float().mean().item()


def stream_file(model, samples: np.ndarray, options, name: str) -> list[Streamed]:
    """Stream samples [N] in one context, or in all and offline."""
    rate = sample_rate_of(model)
    size = max(round(options.chunk_size * rate), 1)
    results = []
    for context in contexts_of(model, options):
        label = f'{name} {context}'
        results.append(stream(model, chunks_of(samples, size), context, len(samples) / rate, label))
        if options.compare_modes:
            compare_with_offline(model, samples, results[-1])
    return results


def contexts_of(model, options) -> list:
    """The contexts to stream in: the one asked for first, then the model's others if all are to be compared."""
    from nemo.collections.asr.parts.att_context.context import AttContext

    asked = context_of(options.att_context_size)
    first = AttContext.parse(model.encoder.att_context_size if asked is None else asked, field='--att_context_size')
    if not options.compare_modes:
        return [first.as_list()]
    others = [AttContext.parse(context) for context in model.encoder.att_context_size_all]
    return [first.as_list()] + [context.as_list() for context in others if context != first]


def stream_stdin(model, options) -> list[Streamed]:
    """Stream the pipe as it comes; afterwards, if asked, the same samples in the other contexts."""
    rate = sample_rate_of(model)
    heard: list[np.ndarray] = []
    pieces = stdin_chunks(sys.stdin.buffer, options.stdin_rate or rate, rate, options.chunk_size, heard)
    first, *others = contexts_of(model, options)
    results = [stream(model, pieces, first, name=f'stdin {first}')]
    if not heard:
        raise ValueError('stdin: there were no samples in the pipe')
    if options.compare_modes:
        samples = np.concatenate(heard)
        compare_with_offline(model, samples, results[0])
        size = max(round(options.chunk_size * rate), 1)
        for context in others:
            results.append(stream(model, chunks_of(samples, size), context, len(samples) / rate, f'stdin {context}'))
            compare_with_offline(model, samples, results[-1])
    return results


def sample_rate_of(model) -> int:
    """Samples per second that the model hears."""
    return model.preprocessor.featurizer.sample_rate


def parity_line(streamed: Streamed) -> str:
    """One line on whether streaming equals offline."""
    figures = streamed.figures()
    tokens = '' if streamed.token_agreement is None else f', {streamed.token_agreement:.2%} of the tokens the same'
    return (
        f"Streamed {streamed.seconds:.1f} s in context {streamed.context}: largest difference to offline "
        f"{streamed.largest_difference:.1e}{tokens}, {figures['chunk_ms_p50']:.1f} ms per chunk (p50), "
        f"real-time factor {figures['real_time_factor']:.3f}"
    )


def stream_one(model, audio_path, chunk_size: float = 0.08, context=None) -> Streamed:
    """Stream a file in one context and compare it with offline: for :func:`parity_line`."""
    samples = read_audio(Path(audio_path), sample_rate_of(model))
    size = max(round(chunk_size * sample_rate_of(model)), 1)
    streamed = stream(model, chunks_of(samples, size), context, len(samples) / sample_rate_of(model), 'streaming')
    compare_with_offline(model, samples, streamed)
    return streamed


def table_of(name: str, results: list[Streamed]):
    """Lay out the results of one audio."""
    from rich.table import Table

    table = Table(title=f'{name}, {results[0].seconds:.1f} s')
    columns = ['context', 'difference', 'tokens', 'look-ahead', 'cache', 'p50', 'p95', 'max', 'RTF']
    for column in columns:
        table.add_column(column, justify='right')
    for result in results:
        figures = result.figures()
        times = [figures[f'chunk_ms_{which}'] for which in ('p50', 'p95', 'max')]
        table.add_row(
            str(result.context).replace(' ', ''),
            '-' if result.largest_difference is None else f'{result.largest_difference:.1e}',
            '-' if result.token_agreement is None else f'{result.token_agreement:.2%}',
            f"{figures['look_ahead_ms']:g} ms",
            f"{figures['cache_bytes_per_stream'] / 1024:.0f} KiB",
            *('-' if value is None else f'{value:.1f} ms' for value in times),
            f"{figures['real_time_factor']:.3f}",
        )
    return table


def draw(path: Path, name: str, results: list[Streamed], model, chunk_size: float) -> None:
    """Plot spectrogram, tokens and time per chunk over the seconds of one audio."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    featurizer = model.preprocessor.featurizer
    frame = featurizer.hop_length / featurizer.sample_rate
    result = results[0]
    figure, axes = pyplot.subplots(
        3, 1, figsize=(11, 7.5), sharex=True, height_ratios=[3, 2, 2], constrained_layout=True
    )
    features = result.output.features[0].float().cpu().numpy()
    image = axes[0].imshow(
        features,
        origin='lower',
        aspect='auto',
        interpolation='nearest',
        cmap='magma',
        extent=(0, features.shape[1] * frame, 0, features.shape[0]),
        vmin=np.percentile(features, 2) if features.size else None,
    )
    figure.colorbar(image, ax=axes[0], label='log-mel, as the encoder sees it', pad=0.01)
    axes[0].set_ylabel('mel band')
    axes[0].set_title(f'{name}: {result.seconds:.1f} s in context {result.context}', loc='left', fontsize=11)
    _draw_tokens(axes[1], result, frame * model.encoder.subsampling_factor)
    _draw_times(axes[2], results, chunk_size)
    axes[2].set_xlabel('seconds of audio')
    axes[2].set_xlim(0, max(result.seconds, frame))
    from nemo.utils.atomic_files import replacing

    with replacing(path.resolve()) as partial:
        figure.savefig(partial, dpi=130, format='png')
    pyplot.close(figure)


def _draw_tokens(axis, result: Streamed, frame: float) -> None:
    tokens = result.output.tokens
    axis.set_ylabel('predicted token')
    if tokens is None:
        axis.text(0.5, 0.5, 'the model has no tokens', transform=axis.transAxes, ha='center', color=GREY)
        return
    tokens = tokens[0].cpu().numpy().reshape(tokens.shape[1], -1)
    seconds = np.arange(len(tokens)) * frame
    for book in range(tokens.shape[1]):
        label = f'codebook {book}' if tokens.shape[1] > 1 else None
        axis.scatter(seconds, tokens[:, book], s=9, marker='s', color=f'C{book}', linewidths=0, label=label)
    if tokens.shape[1] > 1:
        axis.legend(loc='upper right', fontsize=8)
    axis.set_ylim(-0.05 * (tokens.max(initial=1) + 1), 1.1 * (tokens.max(initial=1) + 1))
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis='x', alpha=0.3)


def _draw_times(axis, results: list[Streamed], chunk_size: float) -> None:
    for index, result in enumerate(results):
        seconds = (np.arange(len(result.chunk_ms)) + 1) * chunk_size
        axis.plot(seconds, result.chunk_ms, linewidth=0.9, color=f'C{index}', label=str(result.context))
    longest = [np.percentile(result.chunk_ms, 99.5) for result in results if result.chunk_ms]
    top = 1.4 * max(longest, default=1)
    if top > 0.5 * chunk_size * 1000:
        top = max(top, 1.4 * chunk_size * 1000)  # room for the legend
        axis.axhline(chunk_size * 1000, color='black', linewidth=0.9, linestyle='--', label='real time')
    axis.set_ylim(0, top)
    axis.set_ylabel(f'ms per chunk\nof {chunk_size * 1000:g} ms')
    axis.legend(loc='upper right', fontsize=8, ncols=min(len(results) + 1, 5))
    axis.grid(alpha=0.3)


def restore(path: Path, device: str):
    """Restore a model from a .nemo file, in eval mode.

    Raises:
        ValueError: naming the file, if that fails.
    """
    from nemo.core.classes.modelPT import ModelPT
    from nemo.utils import logging

    if not path.is_file():
        raise ValueError(f'--model_path {path}: there is no such file')
    logging.setLevel(logging.ERROR)  # NeMo tells that there is no training data
    try:
        model = ModelPT.restore_from(str(path), map_location=torch.device(device))
    except Exception as error:  # whatever tarfile, yaml, OmegaConf, torch and the model's class raise
        raise ValueError(f'--model_path {path}: NeMo cannot restore it: {error!r}') from error
    return model.eval()


def run(options: argparse.Namespace, model) -> tuple[list[tuple[str, list[Streamed]]], list[dict]]:
    """Stream all that is asked for; returns the results by audio, and what failed."""
    done, failed = [], []
    if options.stdin_pcm:
        return [('stdin', stream_stdin(model, options))], failed
    entries = [(str(options.audio_path), {'path': options.audio_path}, None)]
    if options.manifest is not None:
        entries = list(manifest_entries(options.manifest))
    for name, entry, error in entries:
        try:
            if error is not None:
                raise ValueError(error)
            samples = read_audio(rate=sample_rate_of(model), **entry)
            done.append((name, stream_file(model, samples, options, Path(name).name)))
        except ValueError as problem:
            print(f'ERROR {problem}', file=sys.stderr)
            failed.append({'audio': name, 'error': str(problem)})
    return done, failed


def write_report(options, done, failed) -> None:
    """Write the figures as JSON; an old report stays whole until the new one is."""
    from nemo.utils.atomic_files import replacing

    report = {
        'model': str(options.model_path),
        'chunk_size': options.chunk_size,
        'threads': torch.get_num_threads(),
        'audio': [
            {'audio': name, 'seconds': results[0].seconds, 'contexts': [result.figures() for result in results]}
            for name, results in done
        ],
        'failed': failed,
    }
    with replacing(options.report.resolve()) as partial:
        partial.write_text(json.dumps(report, indent=2) + '\n')


def main(argv=None) -> int:
    """Stream, print, plot, report; returns the exit status."""
    options = arguments(argv)
    try:
        model = restore(options.model_path, options.device)
        _check_can_stream(model, options)
        done, failed = run(options, model)
    except ValueError as error:
        print(f'ERROR {error}', file=sys.stderr)
        return 2
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110)
    for name, results in done:
        console.print(table_of(name, results))
        if options.compare_modes:
            for result in results:
                if result.largest_difference is not None:
                    print(parity_line(result))
    if options.plot is not None and done:
        draw(options.plot, Path(done[0][0]).name, done[0][1], model, options.chunk_size)
    if options.report is not None:
        write_report(options, done, failed)
    if failed:
        print(f'{len(failed)} of {len(failed) + len(done)} could not be streamed', file=sys.stderr)
    return 0 if not failed else 1 if done else 2


def _check_can_stream(model, options) -> None:
    """Raise ValueError if the model cannot stream in one of the contexts, before any audio is read."""
    from nemo.collections.asr.parts.streaming.session import StreamingSession

    for context in contexts_of(model, options):
        StreamingSession(model, att_context_size=context)


if __name__ == '__main__':
    sys.exit(main())
