# SPDX-License-Identifier: Apache-2.0
"""Measure live streams with smaller weights: speed, size, and the share of equal tokens.

    OMP_NUM_THREADS=1 python benchmarks/streaming_weights.py
    python benchmarks/streaming_weights.py --model recogniser.nemo --manifest validation.json   # agreement, too

Speed is CPU time of a step in turns, with random weights. Agreement is measured with a trained CTC recogniser: the
share of frames with the same token as in float32, and the character error rates. ``make pretrain`` writes a recogniser,
``outputs/pretrain-.../recogniser-1000-pre-trained.nemo``, and a manifest,
``outputs/speech_corpus/test_manifest.json``.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from measure import Quick, in_turn, ratio, timed
from streaming_cases import SessionStream, model_of_size
from tqdm import tqdm

from nemo.collections.asr.metrics.wer import word_error_rate
from nemo.collections.asr.models import EncDecCTCModel
from nemo.collections.asr.parts.preprocessing.segment import AudioSegment
from nemo.collections.asr.parts.streaming import linear
from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession
from nemo.utils import logging

CASES = [('tiny', 1), ('8 x 256', 1), ('8 x 256', 32), ('17 x 512', 1), ('17 x 512', 8)]
LEFT, CHUNK_MS, TURN_SECONDS = 40, 80, 0.1
BYTES = {'float32': 4, 'bfloat16': 2, 'int8': 1}
PRECISIONS = tuple(BYTES)


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--turns', type=int, default=7, help='timed steps of each')
    parser.add_argument('--quick', action=Quick, small=dict(turns=2))
    parser.add_argument('--model', type=Path, help='a CTC recogniser')
    parser.add_argument('--manifest', type=Path, help='a NeMo manifest with texts')
    options = parser.parse_args(argv)
    if options.turns < 2:
        parser.error('--turns must be 2 or more: a ratio needs its spread')
    if (options.model is None) != (options.manifest is None):
        parser.error('--model and --manifest go together')
    return options


def speed(size: str, streams: int, turns: int) -> str:
    """Time a size of model in each precision; returns a row of the table."""
    model = model_of_size(size)
    samples = torch.randn(streams, LEFT * CHUNK_MS * 16, generator=torch.Generator().manual_seed(0)) * 0.1
    runs = {each: SessionStream(model, [LEFT, 0], samples, weights=each) for each in PRECISIONS}
    for run in runs.values():
        for _ in range(LEFT + 8):
            run.step()
    found = in_turn({name: partial(timed, run.step, TURN_SECONDS) for name, run in runs.items()}, turns, size)
    cpu = {name: [seconds.cpu for seconds in each] for name, each in found.items()}
    cells = [f"{1000 * statistics.median(cpu['float32']):.2f}"]
    cells += [f"{ratio(cpu['float32'], cpu[name]).median:.2f} x" for name in PRECISIONS[1:]]
    cells += [' / '.join(f'{megabytes(model.encoder, name):.1f}' for name in PRECISIONS)]
    return f"| {size} | {streams} | {' | '.join(cells)} |"


def megabytes(encoder, precision: str) -> float:
    """Return the size of the linear layers' weights; small ones stay float32, and those of positions."""
    total = 0
    for name, module in encoder.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d)) and getattr(module, 'groups', 1) == 1:
            stays = module.weight.numel() < linear.SMALL or name.endswith('linear_pos')
            total += module.weight.numel() * BYTES['float32' if stays else precision]
    return total / 1e6


@torch.inference_mode()
def recognise(model, samples: torch.Tensor, weights: str) -> torch.Tensor:
    """Stream samples [1, N]; returns the greedy path [A]."""
    session = StreamingSession(model, return_tokens=True, return_text=True, weights=weights)
    outputs = [session.step(piece) for piece in samples.split(session.frame_samples, dim=1)] + [session.finish()]
    joined = StreamingOutput.concatenate(outputs)
    return joined.tokens[0], session.transcript().text


def agreement(model_path: Path, manifest: Path) -> list[str]:
    """Recognise a manifest in each precision, small layers too; returns the rows of the table."""
    linear.SMALL = 0
    model = EncDecCTCModel.restore_from(str(model_path), map_location='cpu').eval()
    model.preprocessor.featurizer.dither = 0.0
    entries = [json.loads(line) for line in manifest.read_text(encoding='utf-8').splitlines() if line.strip()]
    paths, texts = {name: [] for name in PRECISIONS}, {name: [] for name in PRECISIONS}
    for entry in tqdm(entries, desc='recognising', unit='utterance'):
        file = manifest.parent / entry['audio_filepath']
        samples = AudioSegment.from_file(str(file), target_sr=model.preprocessor.featurizer.sample_rate).samples
        for name in PRECISIONS:
            path, text = recognise(model, torch.from_numpy(samples).float().unsqueeze(0), name)
            paths[name].append(path)
            texts[name].append(text)
    said, rows = [entry['text'] for entry in entries], []
    whole = torch.cat(paths['float32'])
    for name in PRECISIONS:
        same = (torch.cat(paths[name]) == whole).float().mean().item()
        rate = word_error_rate(texts[name], said, use_cer=True)
        rows.append(f'| {name} | {same:.2%} | {rate:.1%} |')
    return rows


def main(argv=None) -> None:
    """Measure, and print the tables."""
    options = arguments(argv)
    logging.setLevel(logging.ERROR)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    names = ' | '.join(PRECISIONS[1:])
    print(f"| model | streams | float32, ms | {names} | MB of the layers' weights |\n| --- |{' ---: |' * 5}")
    for size, streams in CASES[:1] if options.quick else CASES:
        print(speed(size, streams, options.turns), flush=True)
    if options.model is not None:
        print('\n| weights | tokens as with float32 | character errors |\n| --- | ---: | ---: |')
        print('\n'.join(agreement(options.model, options.manifest)))


if __name__ == '__main__':
    main()
