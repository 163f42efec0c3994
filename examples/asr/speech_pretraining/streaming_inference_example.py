# SPDX-License-Identifier: Apache-2.0
r"""Stream audio through a model as it would arrive, and say how long that takes and whether it equals offline.

    python streaming_inference_example.py --model_path model.nemo --audio_path speech.wav --compare_modes
    python streaming_inference_example.py --model_path model.nemo --manifest files.json --report report.json
    arecord -f S16_LE -r 16000 -c 1 -t raw | python streaming_inference_example.py --model_path model.nemo --stdin_pcm
    python streaming_inference_example.py --model_path model.nemo --audio_path call.wav --surprise_plot surprise.png \
        --surprise_reference 3.02

Any NeMo model with a causal Conformer encoder and a preprocessor will do: an SSL model, or a fine-tuned CTC, RNNT or hybrid
model. These show their words as they come (of a manifest's files the whole texts), how late each word was, and where the
manifest has a text the word and character error rates.
Audio of another rate or of several channels is resampled and mixed down. Without --compare_modes it streams in one
context; with it in each of the model's, and runs the offline forward beside it.

A model that predicts next tokens (model.objective next_token or both) also says how surprising the stream is:
--surprise prints, as the audio comes, the nats per token of each second and their mean so far; --surprise_plot draws
them below the spectrogram of the first audio. What lies above the model's usual surprise, that at held-out speech of
its training (mean_surprise in a --report of it), is unlike that speech: --surprise_reference shades it.

Exit status: 0; 1 if some of the manifest's files failed (the others were run); 2 if nothing could be run.
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from script_tools import (
    check_folders,
    explained,
    manifest_lines,
    read_audio,
    require_patches,
    restore,
    sample_rate_of,
    write_text,
)
from streaming_tools import (
    Streamed,
    compare_with_offline,
    error_rates,
    parity_line,
    quantile,
    smoothed,
    stream,
    stream_samples,
    streamable_contexts,
)

PCM_BYTES = 2
GREY = '#777777'
SMOOTHED_SECONDS = 2.0  # over which the drawn surprise is averaged


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
    parser.add_argument(
        '--surprise', action='store_true', help='print how surprising each second was, to a model of next tokens'
    )
    parser.add_argument(
        '--surprise_plot', type=Path, help='a PNG file: spectrogram and surprise of the first audio (with --surprise)'
    )
    parser.add_argument(
        '--surprise_reference', type=float, help='nats of usual speech, for --surprise_plot (the mean of the audio)'
    )
    parser.add_argument(
        '--weights',
        default='float32',
        choices=('float32', 'bfloat16', 'int8'),
        help='what weights are held in (float32)',
    )
    parser.add_argument('--report', type=Path, help='a JSON file for the figures')
    parser.add_argument('--device', default='cpu', help='where the model runs (cpu)')
    options = parser.parse_args(argv)
    _check_options(parser, options)
    return options


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with the parser's error if an option has a value that cannot be used."""
    if options.stdin_rate is not None and not options.stdin_pcm:
        parser.error('--stdin_rate goes with --stdin_pcm')
    if options.stdin_rate is not None and options.stdin_rate < 1:
        parser.error('--stdin_rate must be 1 or more')
    if not 0 < options.chunk_size < float('inf'):
        parser.error('--chunk_size must be above 0 seconds')
    check_folders(parser, options, 'plot', 'surprise_plot', 'report')
    if options.surprise_reference is not None and options.surprise_plot is None:
        parser.error('--surprise_reference goes with --surprise_plot')
    if options.surprise_reference is not None and not 0 < options.surprise_reference < float('inf'):
        parser.error('--surprise_reference must be above 0 nats')
    options.surprise = options.surprise or options.surprise_plot is not None


def manifest_entries(path: Path) -> Iterator[tuple[str, dict | None, str | None]]:
    """Yield name, entry and error of each line of a manifest; one of the last two is None.

    Raises:
        ValueError: if there is no manifest, or nothing in it.
    """
    for number, line in manifest_lines(path):
        try:
            yield (*_entry(json.loads(line), path.parent), None)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            yield f'{path}, line {number}', None, f'{path}, line {number}: no NeMo manifest entry: {error!r}'


def _entry(item: dict, folder: Path) -> tuple[str, dict]:
    """Return the name of an entry's audio, and what :func:`read_audio` takes; a relative path starts at the folder."""
    audio = Path(item['audio_filepath'])
    part = {
        'path': audio if audio.is_absolute() else folder / audio,
        'offset': float(item.get('offset') or 0),
        'duration': None if item.get('duration') is None else float(item['duration']),
    }
    part['text'] = item.get('text')
    return str(audio), part


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


def context_of(text: str | None):
    """Return what --att_context_size says: a pair, a number or the name of a preset."""
    try:
        return ast.literal_eval(text) if text is not None else None
    except (ValueError, SyntaxError):
        return text


def stream_file(model, samples: np.ndarray, options, name: str) -> list[Streamed]:
    """Stream samples [N] in one context, or in all and offline."""
    results = []
    for context in contexts_of(model, options):
        results.append(_stream_samples(model, samples, options, context, name))
        if options.compare_modes:
            compare_with_offline(model, samples, results[-1])
    return results


def _stream_samples(model, samples: np.ndarray, options, context, name: str) -> Streamed:
    """Stream samples [N] in one context, as the options say."""
    settings = dict(surprise=options.surprise, words=options.manifest is None, weights=options.weights)
    return stream_samples(model, samples, options.chunk_size, context, f'{name} {context}', **settings)


def contexts_of(model, options) -> list:
    """Return the contexts to stream in: the one asked for, then the model's others if all are to be compared.

    Those that see the whole utterance are left out, for they cannot be streamed.
    """
    from nemo.collections.asr.parts.att_context.context import AttContext

    asked = context_of(options.att_context_size)
    first = AttContext.parse(model.encoder.att_context_size if asked is None else asked, field='--att_context_size')
    if not options.compare_modes:
        return [first.as_list()]
    others = [AttContext.parse(context) for context in streamable_contexts(model)]
    return [first.as_list()] + [context.as_list() for context in others if context != first]


def stream_stdin(model, options) -> list[Streamed]:
    """Stream the pipe as it comes; afterwards, if asked, the same samples in the other contexts."""
    rate = sample_rate_of(model)
    heard: list[np.ndarray] = []
    pieces = stdin_chunks(sys.stdin.buffer, options.stdin_rate or rate, rate, options.chunk_size, heard)
    first, *others = contexts_of(model, options)
    settings = dict(surprise=options.surprise, weights=options.weights)
    results = [stream(model, pieces, first, name=f'stdin {first}', **settings)]
    if not heard:
        raise ValueError('stdin: there were no samples in the pipe')
    if options.compare_modes:
        samples = np.concatenate(heard)
        compare_with_offline(model, samples, results[0])
        for context in others:
            results.append(_stream_samples(model, samples, options, context, 'stdin'))
            compare_with_offline(model, samples, results[-1])
    return results


def table_of(name: str, results: list[Streamed]):
    """Lay out the results of one audio."""
    from rich.table import Table

    table = Table(title=f'{name}, {results[0].seconds:.1f} s')
    columns = ['context', 'difference', 'tokens', 'look-ahead', 'cache', 'p50', 'p95', 'max', 'RTF']
    asked = results[0].surprise is not None
    if asked:
        columns.append('surprise')
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
            *(['-' if figures['mean_surprise'] is None else f"{figures['mean_surprise']:.2f} nats"] if asked else []),
        )
    return table


def draw(path: Path, name: str, results: list[Streamed], model, chunk_size: float) -> None:
    """Plot spectrogram, tokens and time per chunk over the seconds of one audio."""
    with _figure(path, name, results[0], model, [3, 2, 2]) as axes:
        _draw_tokens(axes[1], results[0])
        _draw_times(axes[2], results, chunk_size)


def draw_surprise(path: Path, name: str, results: list[Streamed], model, reference: float | None) -> None:
    """Plot spectrogram and surprise over the seconds of one audio; a reference is the surprise of usual speech."""
    with _figure(path, name, results[0], model, [3, 3]) as axes:
        _draw_surprise(axes[1], results, model.quantizer.num_classes, reference)


@contextmanager
def _figure(path: Path, name: str, result: Streamed, model, heights: list[int]):
    """Give the axes of a figure whose first has the spectrogram; afterwards write it, whole or not at all."""
    import matplotlib

    from nemo.utils.atomic_files import replacing

    matplotlib.use('Agg')
    from matplotlib import pyplot

    featurizer = model.preprocessor.featurizer
    frame = featurizer.hop_length / featurizer.sample_rate
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(11, 0.5 + sum(heights)), sharex=True, height_ratios=heights, constrained_layout=True
    )
    image = _draw_features(axes[0], result, frame)
    figure.colorbar(image, ax=axes[0], label='log-mel, as the encoder sees it', pad=0.01)
    axes[0].set_title(f'{name}: {result.seconds:.1f} s in context {result.context}', loc='left', fontsize=11)
    try:
        yield axes
        axes[-1].set_xlabel('seconds of audio')
        axes[-1].set_xlim(0, max(result.seconds, frame))
        with replacing(path.resolve()) as partial:
            figure.savefig(partial, dpi=130, format='png')
    finally:
        pyplot.close(figure)


def _draw_features(axis, result: Streamed, frame: float):
    features = result.output.features[0].float().cpu().numpy()
    axis.set_ylabel('mel band')
    return axis.imshow(
        features,
        origin='lower',
        aspect='auto',
        interpolation='nearest',
        cmap='magma',
        extent=(0, features.shape[1] * frame, 0, features.shape[0]),
        vmin=np.percentile(features, 2) if features.size else None,
    )


def _draw_tokens(axis, result: Streamed) -> None:
    tokens = result.output.tokens
    axis.set_ylabel('predicted token')
    if tokens is None:
        axis.text(0.5, 0.5, 'the model has no tokens', transform=axis.transAxes, ha='center', color=GREY)
        return
    tokens = tokens[0].cpu().numpy().reshape(tokens.shape[1], -1)
    seconds = np.arange(len(tokens)) * result.token_seconds
    for book in range(tokens.shape[1]):
        label = f'codebook {book}' if tokens.shape[1] > 1 else None
        axis.scatter(seconds, tokens[:, book], s=9, marker='s', color=f'C{book}', linewidths=0, label=label)
    if tokens.shape[1] > 1:
        axis.legend(loc='upper right', fontsize=8)
    axis.set_ylim(-0.05 * (tokens.max(initial=1) + 1), 1.1 * (tokens.max(initial=1) + 1))
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis='x', alpha=0.3)


def _draw_surprise(axis, results: list[Streamed], classes: int, reference: float | None) -> None:
    """Draw the smoothed surprise of each context; of the first one each token, and where it is above the reference."""
    guess, usual = np.log(classes), reference or results[0].mean_surprise
    highest = [guess]
    for index, result in enumerate(results):
        if not len(result.surprise):
            continue
        seconds = result.surprise_seconds + result.token_seconds / 2
        mean = smoothed(result.surprise, 2 * round(SMOOTHED_SECONDS / result.token_seconds / 2) + 1)
        highest += [mean.max(), np.percentile(result.surprise, 98)]
        if index == 0:
            axis.scatter(seconds, result.surprise, s=5, color=GREY, alpha=0.5, linewidths=0, label='each token')
            _shade_above(axis, seconds, mean, usual)
        label = f'{result.context}, smoothed over {SMOOTHED_SECONDS:g} s'
        axis.plot(seconds, mean, linewidth=1.8, color=f'C{index}', label=label)
    if usual is not None:
        label = f"{'mean' if reference is None else 'usual speech'}, {usual:.2f}"
        axis.axhline(usual, color='black', linewidth=1.2, linestyle='--', label=label)
    axis.axhline(guess, color=GREY, linewidth=1.2, linestyle=':', label=f'a guess, ln {classes}')
    if results[0].settling:
        axis.axvspan(0, results[0].settling, color=GREY, alpha=0.2, linewidth=0, label='settling')
    axis.set_ylim(0, 1.25 * max(highest))  # room for the legend
    axis.set_ylabel('surprise, nats per token')
    axis.legend(loc='upper right', fontsize=8, ncols=5)
    axis.grid(alpha=0.3)


def _shade_above(axis, seconds: np.ndarray, values: np.ndarray, level: float | None) -> None:
    if level is not None:
        above = dict(where=values > level, interpolate=True)
        axis.fill_between(seconds, values, level, color='C3', alpha=0.35, linewidth=0, **above)


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


def run(options: argparse.Namespace, model) -> tuple[list[tuple[str, list[Streamed]]], list[dict]]:
    """Stream all that is asked for; return the results by audio, and what failed."""
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
            text = entry.pop('text', None)
            samples = read_audio(rate=sample_rate_of(model), **entry)
            results = stream_file(model, samples, options, Path(name).name)
            for result in results:
                result.reference = text
            done.append((name, results))
        except ValueError as problem:
            print(f'ERROR {problem}', file=sys.stderr)
            failed.append({'audio': name, 'error': str(problem)})
    return done, failed


def write_report(options, done, failed) -> None:
    """Write the figures as JSON; an old report stays whole until the new one is."""
    report = {
        'model': str(options.model_path),
        'chunk_size': options.chunk_size,
        'threads': torch.get_num_threads(),
        'audio': [
            {'audio': name, 'seconds': results[0].seconds, 'contexts': [result.figures() for result in results]}
            for name, results in done
        ],
        'recognition': recognition(done),
        'failed': failed,
    }
    write_text(options.report.resolve(), json.dumps(report, indent=2) + '\n')


def show(done: list[tuple[str, list[Streamed]]]) -> None:
    """Print a table for each audio, and below it a line for each context that was compared with offline."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110)
    for name, results in done:
        console.print(table_of(name, results))
        for result in results:
            if result.largest_difference is not None:
                print(parity_line(result))
            if result.text is not None:
                print(f'{result.context} heard: {result.text}')
        if results[0].reference:
            print(f'said: {results[0].reference}')
    for context, rates in recognition(done).items():
        late = (
            ''
            if rates['word_latency_ms_p50'] is None
            else (
                f", words certain {rates['word_latency_ms_p50']:.0f} ms (p50) and {rates['word_latency_ms_p95']:.0f} ms (p95) "
                'after their last frame'
            )
        )
        errors = (
            f"word errors {rates['wer']:.1%}, character errors {rates['cer']:.1%}"
            if 'wer' in rates
            else 'no text to compare'
        )
        print(f'== Recognised in context {context}: {errors}{late}')


def recognition(done: list[tuple[str, list[Streamed]]]) -> dict[str, dict]:
    """Return, for each context that words were recognised in, the error rates of all audio with a text, and latencies."""
    by_context: dict[str, list[Streamed]] = {}
    for _, results in done:
        for result in results:
            if result.text is not None:
                by_context.setdefault(str(result.context), []).append(result)
    found = {}
    for context, results in by_context.items():
        late = sorted(1000 * seconds for result in results for seconds in result.word_latencies)
        found[context] = {f'word_latency_ms_p{share:.0f}': quantile(late, share / 100) for share in (50, 95)}
        compared = [result for result in results if result.reference]
        if compared:
            texts = [result.text for result in compared], [result.reference for result in compared]
            found[context].update(error_rates(*texts))
    return found


def main(argv=None) -> int:
    """Stream, print, plot and report; return the exit status."""
    options = arguments(argv)
    require_patches(__file__)
    try:
        model = restore(options.model_path, options.device)
        _check_can_stream(model, options)
        done, failed = run(options, model)
    except ValueError as error:
        print(f'ERROR {explained(error)}', file=sys.stderr)
        return 2
    show(done)
    if options.plot is not None and done:
        draw(options.plot, Path(done[0][0]).name, done[0][1], model, options.chunk_size)
    if options.surprise_plot is not None and done:
        name, results = done[0]
        draw_surprise(options.surprise_plot, Path(name).name, results, model, options.surprise_reference)
    if options.report is not None:
        write_report(options, done, failed)
    if failed:
        print(f'{len(failed)} of {len(failed) + len(done)} could not be streamed', file=sys.stderr)
    return 0 if not failed else 1 if done else 2


def _check_can_stream(model, options) -> None:
    """Raise ValueError if the model cannot stream in one of the contexts, before any audio is read."""
    from nemo.collections.asr.parts.streaming.session import StreamingSession

    for context in contexts_of(model, options):
        StreamingSession(model, att_context_size=context, return_surprise=options.surprise, weights=options.weights)


if __name__ == '__main__':
    sys.exit(main())
