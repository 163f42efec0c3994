# SPDX-License-Identifier: Apache-2.0
r"""Transcribe audio files or a microphone as a live stream, word by word.

    python streaming_inference_example.py --model recogniser.nemo speech.wav
    python streaming_inference_example.py --model recogniser.nemo --manifest test.json --output predictions.json
    arecord -f S16_LE -r 16000 -c 1 -t raw | python streaming_inference_example.py --model recogniser.nemo -

The model is a CTC, RNNT or hybrid model with a causal Conformer encoder, such as finetune_streaming.py makes. A word
is printed when it is final, and a new line when an utterance ends. "-" reads signed 16-bit mono PCM from a pipe, until the pipe
ends or Ctrl-C. evaluate_streaming.py measures latency, error rates and the difference to offline.

Exit status: 0; 2 if the model or some of the audio cannot be used, with an error line for each.
"""

import argparse
import json
import sys
from collections.abc import Iterator

import numpy as np
import torch
from script_tools import (
    context_option,
    parse_stream_options,
    report_error,
    require_patches,
    restore,
    stream_parser,
)

PCM_BYTES = 2


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = stream_parser(__doc__, 'a manifest with pred_text and the words of each entry')
    parser.add_argument(
        '--att-context-size', type=context_option, help='such as "[40,0]" or low (the first of the model)'
    )
    parser.add_argument('--sample-rate', type=int, help='sampling rate of the pipe (that of the model)')
    parser.add_argument(
        '--end-silence', type=float, default=1.2, help='seconds of silence that end an utterance (1.2)'
    )
    parser.add_argument('--confidence', action='store_true', help='add the confidence of each word to --output')
    options = parse_stream_options(parser, argv)
    if options.sample_rate is not None and options.sample_rate < 1:
        parser.error(f'--sample-rate is {options.sample_rate}; it must be 1 or more')
    return options


def pipe_pieces(pipe, rate: int, own_rate: int, seconds: float) -> Iterator[torch.Tensor]:
    """Yield pieces [1, n] of 16-bit PCM as they arrive, at ``rate``."""
    resampler = None
    if own_rate != rate:
        import soxr

        resampler = soxr.ResampleStream(own_rate, rate, 1, dtype='float32')
    size, ended = max(round(seconds * own_rate), 1) * PCM_BYTES, False
    while not ended:
        try:
            data = pipe.read(size)
        except KeyboardInterrupt:
            data = b''
        ended = len(data) < size
        samples = np.frombuffer(data[: len(data) // PCM_BYTES * PCM_BYTES], dtype='<i2').astype(np.float32) / 32768
        if resampler is not None:
            samples = resampler.resample_chunk(samples, last=ended)
        yield torch.from_numpy(samples)[None]


def pieces_of(entry: dict, options: argparse.Namespace, rate: int) -> Iterator[torch.Tensor]:
    """Return the pieces [1, n] of an entry's audio.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    from nemo.collections.asr.data.audio_files import read_entry

    if entry['audio_filepath'] == '-':
        return pipe_pieces(sys.stdin.buffer, rate, options.sample_rate or rate, options.step_seconds)
    samples = torch.from_numpy(read_entry(entry, rate))[None]
    return iter(samples.split(max(round(options.step_seconds * rate), 1), dim=1))


def transcribe(session, pieces: Iterator[torch.Tensor]) -> dict:
    """Stream pieces, print the words as they come, and return the transcript as keys of a manifest."""
    session.reset([0])

    def show(update) -> None:
        print(*(f'{word.text} ' for word in update.final_words), sep='', end='\n' * bool(update.utterance_ends))
        sys.stdout.flush()

    for piece in pieces:
        show(session.step(piece).text[0])
    show(session.finish().text[0])
    print()
    transcript = session.transcript()
    return {'pred_text': transcript.text, 'words': [vars(word) for word in transcript.words]}


def main(argv=None) -> int:
    """Transcribe, print and write; return the exit status."""
    options = arguments(argv)
    require_patches(__file__)
    from nemo.collections.asr.data.audio_files import audio_entries
    from nemo.collections.asr.parts.streaming.session import StreamingSession
    from nemo.collections.asr.parts.streaming.text import TextOptions
    from nemo.utils.atomic_files import write_text

    done, status = [], 0
    try:
        model = restore(options.model, options.device)
        text = TextOptions(silence_after_speech=options.end_silence, confidence=options.confidence)
        session = StreamingSession(model, att_context_size=options.att_context_size, return_text=text)
        entries = audio_entries(options.audio, options.manifest)
    except ValueError as error:
        return report_error(__file__, error)
    for entry in entries:
        try:
            pieces = pieces_of(entry, options, session.sample_rate)
            print(f"{entry['audio_filepath']}:")
            done.append({**entry, **transcribe(session, pieces)})
        except ValueError as error:
            status = report_error(__file__, error)
    if options.output is not None:
        write_text(options.output.resolve(), ''.join(json.dumps(entry, ensure_ascii=False) + '\n' for entry in done))
    return status


if __name__ == '__main__':
    sys.exit(main())
