# SPDX-License-Identifier: Apache-2.0
"""Compare NeMo's streaming pipelines over a recogniser with offline: live streams, and NeMo's own.

    python benchmarks/nemo_pipelines.py --model recogniser.nemo --manifest validation.json [--decoding RNNT]

The model recognises word pieces (``finetune_streaming.py`` with ``model.tokenizer``). Three pipelines run: over live streams
(``streaming.live: true``), NeMo's own, and NeMo's own with the model's normalisation, which it leaves out. The last still
differs from offline: feature frames at a cut are computed from a part of their window, and a stream begins with
frames of silence, where offline has padding. NeMo 3.0.0 or later.
"""

import argparse
import copy
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

try:
    from nemo.collections.asr.inference.factory.pipeline_builder import PipelineBuilder
    from nemo.collections.asr.inference.model_wrappers import asr_inference_wrapper
except ModuleNotFoundError as error:
    sys.exit(f'nemo_pipelines: error: this NeMo has no streaming pipelines ({error}); 3.0.0 has')
from nemo.collections.asr.metrics.wer import word_error_rate
from nemo.collections.asr.parts.preprocessing.segment import AudioSegment

CONFIG = Path(__file__).resolve().parents[1] / 'examples/asr/conf/asr_streaming_inference/cache_aware.yaml'


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path, required=True, help='a recogniser of word pieces')
    parser.add_argument('--manifest', type=Path, required=True, help='a NeMo manifest with texts')
    parser.add_argument('--decoding', choices=['CTC', 'RNNT'], default='CTC')
    parser.add_argument('--context', type=json.loads, help="[left, right] (the model's first)")
    return parser.parse_args(argv)


@contextmanager
def normalised():
    """Let NeMo's pipelines keep the normalisation of a model's preprocessor while the block runs."""

    def keep(cfg):
        cfg = copy.deepcopy(cfg)
        cfg.preprocessor.update({'dither': 0.0, 'pad_to': 0})
        return cfg

    with mock.patch.object(asr_inference_wrapper, 'make_preprocessor_deterministic', keep):
        yield


def pipeline_of(options: argparse.Namespace, live: bool):
    """Build a pipeline from the shipped config."""
    settings = {
        'log_level': 40,
        'asr_decoding_type': options.decoding,
        'asr': {'model_name': str(options.model)},
        'streaming': {'live': live, 'att_context_size': options.context},
        'endpointing': {'stop_history_eou': -1},
    }
    return PipelineBuilder.build_pipeline(OmegaConf.merge(OmegaConf.load(CONFIG), settings))


@torch.inference_mode()
def offline(model, path: Path, decoding: str) -> str:
    """Return the text of a whole file."""
    samples = torch.from_numpy(AudioSegment.from_file(path, target_sr=model.preprocessor._sample_rate).samples)
    features, length = model.preprocessor(input_signal=samples[None], length=torch.tensor([len(samples)]))
    encoded, length = model.encoder(audio_signal=features, length=length)
    if decoding == 'RNNT':
        return model.decoding.rnnt_decoder_predictions_tensor(encoded, length, return_hypotheses=True)[0].text
    log_probs = getattr(model, 'ctc_decoder', model.decoder)(encoder_output=encoded)
    steps = getattr(model, 'ctc_decoding', model.decoding)
    return steps.ctc_decoder_predictions_tensor(log_probs, decoder_lengths=length, return_hypotheses=True)[0].text


def main(argv=None) -> int:
    """Run the pipelines and print a table."""
    options = arguments(argv)
    entries = [json.loads(line) for line in options.manifest.read_text(encoding='utf-8').splitlines() if line.strip()]
    files = [options.manifest.resolve().parent / entry['audio_filepath'] for entry in entries]
    live = pipeline_of(options, live=True)
    with normalised():
        kept = pipeline_of(options, live=False)
    pipelines = {'live': live, "NeMo's": pipeline_of(options, live=False), "NeMo's, normalised": kept}
    model = live.asr_model.asr_model
    whole = [offline(model, path, options.decoding) for path in tqdm(files, desc='offline')]
    texts = [entry['text'] for entry in entries]
    print(f"{len(files)} utterances, {sum(len(text.split()) for text in whole)} words offline")
    print(
        '| | words that differ from offline, % | utterances that differ | word errors, % |\n| --- | --- | --- | --- |'
    )
    print(f'| offline | 0 | 0 | {100 * word_error_rate(whole, texts):.2f} |')
    for name, pipeline in pipelines.items():
        found = pipeline.run([str(path) for path in files])
        texts_found = [' '.join(found[index]['text'].split()) for index in range(len(files))]
        other = sum(text.split() != expected.split() for text, expected in zip(texts_found, whole))
        differ, errors = 100 * word_error_rate(texts_found, whole), 100 * word_error_rate(texts_found, texts)
        print(f'| {name} | {differ:.2f} | {other} | {errors:.2f} |')
    return 0


if __name__ == '__main__':
    sys.exit(main())
