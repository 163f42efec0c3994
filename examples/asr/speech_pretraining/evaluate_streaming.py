# SPDX-License-Identifier: Apache-2.0
r"""Measure live streams of a model: difference to offline, time, word errors, word latency, surprise.

    python evaluate_streaming.py --model model.nemo speech.wav
    python evaluate_streaming.py --model recogniser.nemo --manifest test.json --output report.json
    python evaluate_streaming.py --model next_token.nemo --manifest test.json --surprise

Each audio is streamed in steps of --step-seconds, in each context of the model that does not need the whole utterance,
or in those of --att-context-size. The columns:

  difference   largest difference of the encoder's outputs to the offline forward; tokens: share of equal tokens
  look-ahead   later audio that an output depends on, to the end of its analysis window; state: memory of a stream
  step         computing time of a step, median and 95th percentile; RTF: computing time per second of audio
  WER, CER     over all entries of the manifest that have a text, of a recogniser
  latency      audio between a word's end and the step that makes it final, median and 95th percentile
  surprise     nats per token, of a model that predicts next tokens (with --surprise)

Exit status: 0; 2 if the model, a context or some of the audio cannot be used, with an error line for each.
"""

import argparse
import sys

from script_tools import (
    context_option,
    parse_stream_options,
    report_error,
    require_patches,
    restore,
    sample_rate_of,
    stream_parser,
)

WEIGHTS = ('float32', 'bfloat16', 'int8')


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = stream_parser(__doc__, 'a JSON file for the figures')
    parser.add_argument(
        '--att-context-size', type=context_option, nargs='+', help='such as "[40,0]" or low (all of the model)'
    )
    parser.add_argument('--surprise', action='store_true', help='measure how well next tokens are predicted')
    parser.add_argument('--weights', default='float32', choices=WEIGHTS, help='precision of the weights (float32)')
    return parse_stream_options(parser, argv)


def contexts_of(model, options: argparse.Namespace) -> list[list[int]]:
    """Return the contexts to stream in.

    Raises:
        ValueError: if the model cannot stream in one of them, with the reason.
    """
    from nemo.collections.asr.parts.att_context.context import AttContext
    from nemo.collections.asr.parts.streaming.evaluation import streamable_contexts
    from nemo.collections.asr.parts.streaming.session import StreamingSession

    contexts = streamable_contexts(model) or model.encoder.att_context_size_all
    if options.att_context_size is not None:
        parsed = [AttContext.parse(each, field='--att-context-size') for each in options.att_context_size]
        contexts = [context.as_list() for context in parsed]
    for context in contexts:
        StreamingSession(model, 1, context, return_surprise=options.surprise, weights=options.weights)
    return contexts


def measure_entry(model, entry: dict, contexts: list, options: argparse.Namespace) -> list:
    """Stream an entry in each context.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    from nemo.collections.asr.data.audio_files import read_entry
    from nemo.collections.asr.parts.streaming.evaluation import measure_stream

    samples, text = read_entry(entry, sample_rate_of(model)), hasattr(model, 'decoding')
    wanted = dict(return_surprise=options.surprise, weights=options.weights, return_text=text)
    return [measure_stream(model, samples, context, options.step_seconds, **wanted) for context in contexts]


def table(rows: list[dict]):
    """Lay out the figures, a row for each context."""
    from rich.table import Table

    columns = {
        'context': lambda row: str(row['att_context_size']),
        'difference': lambda row: _text(row, 'largest_difference', '{:.1e}'),
        'tokens': lambda row: _text(row, 'token_agreement', '{:.2%}'),
        'look-ahead': lambda row: _text(row, 'look_ahead_ms', '{:g} ms'),
        'state': lambda row: f"{row['cache_bytes_per_stream'] / 1024:.0f} KiB",
        'step': lambda row: _pair(row, 'step_ms', '{:.1f}'),
        'RTF': lambda row: _text(row, 'real_time_factor', '{:.3f}'),
        'WER': lambda row: _text(row, 'wer', '{:.1%}'),
        'CER': lambda row: _text(row, 'cer', '{:.1%}'),
        'latency': lambda row: _pair(row, 'word_latency_ms', '{:.0f}'),
        'surprise': lambda row: _text(row, 'surprise', '{:.2f}'),
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: values for name, values in cells.items() if set(values) != {'-'}}
    made = Table(*cells, title=f"{rows[0]['audios']} audios, {rows[0]['seconds']:.1f} s")
    for values in zip(*cells.values()):
        made.add_row(*values)
    return made


def _text(row: dict, name: str, form: str) -> str:
    return '-' if row[name] is None else form.format(row[name])


def _pair(row: dict, name: str, form: str) -> str:
    low, high = (_text(row, f'{name}_p{share}', form) for share in (50, 95))
    return '-' if low == '-' else f'{low} / {high} ms'


def main(argv=None) -> int:
    """Measure, print and write; return the exit status."""
    options = arguments(argv)
    require_patches(__file__)
    from nemo.collections.asr.data.audio_files import audio_entries

    try:
        model = restore(options.model, options.device)
        contexts = contexts_of(model, options)
        entries = audio_entries(options.audio, options.manifest)
    except ValueError as error:
        return report_error(__file__, error)
    from rich.console import Console
    from rich.progress import track

    from nemo.collections.asr.parts.streaming.evaluation import summarize_streams
    from nemo.utils.atomic_files import write_json

    console, done, failed = Console(width=None if sys.stdout.isatty() else 140), [], []
    for entry in track(entries, 'Streaming', console=Console(stderr=True)):
        try:
            done.append((entry, measure_entry(model, entry, contexts, options)))
        except ValueError as error:
            report_error(__file__, error)
            failed.append({**entry, 'error': str(error)})
    if not done:
        return 2
    texts = [entry.get('text') for entry, _ in done]
    rows = [{'audios': len(done), **summarize_streams(each, texts)} for each in zip(*(found for _, found in done))]
    console.print(table(rows))
    if options.output is not None:
        audios = [
            {
                **entry,
                'contexts': [{**summarize_streams([one], [entry.get('text')]), 'pred_text': one.text} for one in each],
            }
            for entry, each in done
        ]
        settings = {'model': str(options.model), 'step_seconds': options.step_seconds, 'weights': options.weights}
        write_json(options.output, {'settings': settings, 'contexts': rows, 'audio': audios, 'failed': failed})
    return 2 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
