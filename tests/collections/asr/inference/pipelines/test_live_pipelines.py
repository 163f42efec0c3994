# SPDX-License-Identifier: Apache-2.0
"""NeMo's pipelines give the words of the offline forward, and an error of one stream changes no other."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from omegaconf import OmegaConf
from tiny_recogniser import tiny_recogniser
from word_pieces import make_tokenizer

pytest.importorskip('nemo.collections.asr.inference', reason='this NeMo has no streaming pipelines')

from nemo.collections.asr.inference.factory.pipeline_builder import PipelineBuilder
from nemo.collections.asr.inference.pipelines.cache_aware_ctc_pipeline import CacheAwareCTCPipeline
from nemo.collections.asr.inference.pipelines.live_pipelines import FailedStep, LiveCTCPipeline, LiveRNNTPipeline
from nemo.collections.asr.inference.streaming.framing.request import FeatureBuffer, Frame
from nemo.collections.asr.inference.streaming.framing.request_options import ASRRequestOptions

LENGTHS = (40000, 23456, 61234, 900)  # samples; the last is shorter than a frame of the encoder
STATISTICS = {'fixed_mean': [-8.0] * 80, 'fixed_std': [4.0] * 80}
CONTEXTS = {
    'one context': ['model.encoder.att_context_size=[6,0]'],
    "layers' contexts": [
        'model.encoder.att_context_size=[6,0]',
        '+model.encoder.layer_att_context_size=[[0,[3,0]],[1,[6,0]]]',
    ],
    'look-ahead': ['model.encoder.att_context_size=[6,1]'],
}
CONFIG = Path(__file__).resolve().parents[5] / 'examples/asr/conf/asr_streaming_inference/cache_aware.yaml'
SETTINGS = {'log_level': 40, 'streaming': {'batch_size': 3, 'num_slots': 3}, 'endpointing': {'stop_history_eou': -1}}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def audio(tmp_path_factory):
    """Files of tones of a tenth of a second, in noise."""
    folder, random = tmp_path_factory.mktemp('audio'), np.random.default_rng(0)
    for index, length in enumerate(LENGTHS):
        pitch = np.repeat(random.uniform(100, 6000, size=length // 1600 + 1), 1600)[:length]
        samples = 0.2 * np.sin(2 * np.pi * np.cumsum(pitch) / 16000) + 0.01 * random.standard_normal(length)
        soundfile.write(folder / f'{index}.wav', samples, 16000, subtype='FLOAT')
    return [str(folder / f'{index}.wav') for index in range(len(LENGTHS))]


@pytest.fixture(scope='module')
def saved(tokenizer, tmp_path_factory):
    """Makes models and returns them with their files; each once."""
    folder, made = tmp_path_factory.mktemp('models'), {}

    def of(kind, contexts, normalize=STATISTICS):
        key = kind, contexts, normalize is not None
        if key not in made:
            statistics = 'model.preprocessor.normalize=' + ('NA' if normalize is None else _hydra(normalize))
            made[key] = tiny_recogniser(kind, *CONTEXTS[contexts], statistics, tokenizer=tokenizer)
            made[key].save_to(str(folder / f'{len(made)}.nemo'))
            made[key].path = folder / f'{len(made)}.nemo'
        return made[key]

    return of


def _hydra(statistics: dict) -> str:
    return '{%s}' % ','.join(f'{key}: {values}' for key, values in statistics.items())


def pipeline_of(model, decoding='CTC', **streaming):
    """Build a pipeline as NeMo's script does, from the shipped config."""
    asr = {'asr_decoding_type': decoding, 'asr': {'model_name': str(model.path)}, 'streaming': streaming}
    return PipelineBuilder.build_pipeline(OmegaConf.merge(OmegaConf.load(CONFIG), SETTINGS, asr))


@functools.cache
def _built(model, decoding):
    return pipeline_of(model, decoding)


def without_streams(model, decoding='CTC'):
    """Return the pipeline of a model, built once, between two sessions."""
    pipeline = _built(model, decoding)
    pipeline.reset_session()
    return pipeline


@torch.inference_mode()
def offline(model, path, decoding):
    """What a model says of a whole file."""
    samples = torch.from_numpy(soundfile.read(path, dtype='float32')[0]).unsqueeze(0)
    features, length = model.preprocessor(input_signal=samples, length=torch.tensor([samples.shape[1]]))
    encoded, length = model.encoder(audio_signal=features, length=length)
    if decoding == 'RNNT':
        return model.decoding.rnnt_decoder_predictions_tensor(encoded, length, return_hypotheses=True)[0]
    log_probs = getattr(model, 'ctc_decoder', model.decoder)(encoder_output=encoded)
    steps = getattr(model, 'ctc_decoding', model.decoding)
    found = steps.ctc_decoder_predictions_tensor(log_probs, decoder_lengths=length, return_hypotheses=True)[0]
    found.path = log_probs[0].argmax(dim=1).tolist()
    return found


@pytest.mark.parametrize('contexts', CONTEXTS)
@pytest.mark.parametrize('kind, decoding', [('ctc', 'CTC'), ('rnnt', 'RNNT'), ('hybrid', 'CTC'), ('hybrid', 'RNNT')])
def test_words_are_those_of_the_offline_forward(saved, audio, kind, decoding, contexts):
    model = saved(kind, contexts)
    pipeline = without_streams(model, decoding)
    assert type(pipeline) is {'CTC': LiveCTCPipeline, 'RNNT': LiveRNNTPipeline}[decoding]
    said = pipeline.run(audio)  # four files in three slots
    expected = [offline(model, path, decoding).text.split() for path in audio]
    assert [said[index]['text'].split() for index in range(len(audio))] == expected
    assert all(len(''.join(words)) > 8 for words in expected[:-1]), expected
    again = pipeline.run(audio[1::-1])  # nothing is left of the streams before
    assert [again[index]['text'].split() for index in range(2)] == expected[1::-1]


@pytest.mark.parametrize('contexts', ['one context', 'look-ahead'])
@pytest.mark.parametrize('kind, decoding', [('ctc', 'CTC'), ('rnnt', 'RNNT')])
def test_endpointing_looks_at_the_last_frames(saved, audio, kind, decoding, contexts):
    model = saved(kind, contexts)
    pipeline = without_streams(model, decoding)
    blank, piece = pipeline.blank_id, int(16000 * pipeline.chunk_size_in_secs)
    samples = torch.from_numpy(soundfile.read(audio[0], dtype='float32')[0])
    path = path_of(model, audio[0], decoding, blank)
    starts = range(0, len(samples) - piece, piece)
    for start in starts:
        options = ASRRequestOptions(stop_history_eou=800)  # ten frames, and two more that it leaves
        frame = Frame(samples[start : start + piece], 7, is_first=start == 0, options=options)
        pipeline.transcribe_step([frame])
        emitted = pipeline.get_state(7).global_offset
        assert pipeline.get_state(7).get_label_buffer() == ([blank] * 12 + path[:emitted])[-12:]
    assert len(starts) > 5 and emitted > 12 and len(set(path[:emitted])) > 1


def path_of(model, path, decoding, blank):
    """Of each frame the label that a pipeline is told: a CTC path, or the last token that a transducer says in it."""
    found = offline(model, path, decoding)
    if decoding == 'CTC':
        return found.path
    labels = [blank] * 100
    for frame, token in zip(found.timestamp.tolist(), found.y_sequence.tolist()):
        labels[frame] = token
    return labels


def test_an_utterance_that_ends_in_mid_stream_is_final_and_nothing_is_lost(saved, audio):
    pipeline = without_streams(saved('ctc', 'one context'))
    options = [ASRRequestOptions(stop_history_eou=160) for _ in audio]
    cut = pipeline.run(audio, options)
    whole = pipeline.run(audio)
    for index in range(len(audio)):
        assert cut[index]['text'].replace(' ', '') == whole[index]['text'].replace(' ', '')
        ends = [segment.end for segment in whole[index]['segments']]
        assert ends == sorted(ends) and all(0 <= end <= LENGTHS[index] / 16000 + 0.5 for end in ends)


def test_word_times_are_counted_from_the_beginning_of_the_stream(saved, audio):
    model = saved('ctc', 'look-ahead')
    segments = without_streams(model).run(audio[:1])[0]['segments']
    said = [frame for frame, token in enumerate(offline(model, audio[0], 'CTC').path) if token != 64]
    assert segments[0].start == pytest.approx(0.08 * said[0], abs=0.09)
    assert segments[-1].end == pytest.approx(0.08 * said[-1], abs=0.33)


def test_statistics_decide_unless_the_config_does(saved, audio):
    without = saved('ctc', 'one context', None)
    assert type(pipeline_of(without)) is CacheAwareCTCPipeline
    live = pipeline_of(without, live=True)
    assert type(live) is LiveCTCPipeline
    assert live.run(audio[:1])[0]['text'].split() == offline(without, audio[0], 'CTC').text.split()
    assert type(pipeline_of(saved('ctc', 'one context'), live=False)) is CacheAwareCTCPipeline
    with pytest.raises(ValueError, match="streaming.live is 'maybe'; it must be auto, true or false"):
        pipeline_of(without, live='maybe')


def pieces_of(path, stream, count=4):
    """The first pieces of a file, as a client sends them."""
    samples = torch.from_numpy(soundfile.read(path, dtype='float32')[0])[: 5000 * count]
    options = ASRRequestOptions()
    return [
        Frame(piece, stream, is_first=not index, is_last=index == count - 1, options=options)
        for index, piece in enumerate(samples.split(5000))
    ]


def with_samples(change):
    return lambda frame: replace(frame, samples=change(frame.samples.clone()))


BAD_PIECES = {
    'NaN': (with_samples(lambda samples: samples.index_fill_(0, torch.tensor([7]), float('nan'))), 'NaN or infinite'),
    'Inf': (with_samples(lambda samples: samples.index_fill_(0, torch.tensor([7]), float('inf'))), 'NaN or infinite'),
    'integers': (with_samples(lambda samples: (samples * 32767).to(torch.int16)), 'torch.int16'),
    'no tensor': (with_samples(lambda samples: samples.numpy()), 'ndarray'),
    'length': (lambda frame: replace(frame, length=5001), 'length of stream 2 is 5001'),
    'unknown': (lambda frame: replace(frame, stream_id=9), 'stream 9 is not open'),
    'first again': (lambda frame: replace(frame, is_first=True), 'stream 2 is open'),
    'another piece': (lambda frame: replace(frame, stream_id=1), 'stream 1 has another piece'),
    'overflow': (with_samples(lambda samples: samples.fill_(1e25)), 'stream 2: .* NaN or infinite'),
    'features': (lambda frame: FeatureBuffer(torch.zeros(80, 8), 2), 'FeatureBuffer'),
}


@pytest.mark.parametrize('kind, what', [*(('ctc', what) for what in BAD_PIECES), ('rnnt', 'overflow')])
def test_an_error_belongs_to_its_stream(saved, audio, kind, what):
    pipeline = without_streams(saved(kind, 'one context'), kind.upper())
    first, second = pieces_of(audio[0], 1), pieces_of(audio[2], 2)
    alone = [pipeline.transcribe_step([piece])[0] for piece in first]
    break_, reason = BAD_PIECES[what]
    second[1] = break_(second[1])
    together = [pipeline.transcribe_step([one, other]) for one, other in zip(first, second)]
    assert [str(mine) for mine, _ in together] == [str(output) for output in alone]
    failed = [output for _, output in together if isinstance(output, FailedStep)]
    assert together[1][1] is failed[0] and re.search(reason, failed[0].error)
    assert failed[0].stream_id == getattr(second[1], 'stream_id', 2) and not failed[0].final_transcript
    lost = what in ('NaN', 'Inf', 'overflow', 'integers', 'no tensor', 'length')
    assert len(failed) == (3 if lost else 1)  # a stream that lost a piece is closed
    again = [pipeline.transcribe_step([piece])[0] for piece in pieces_of(audio[0], 2)]
    assert [str(output) for output in again] == [str(output) for output in alone]  # its slot is as new


def test_a_client_too_many_and_one_without_options_lose_nobodys_step(saved, audio):
    pipeline = without_streams(saved('ctc', 'one context'))
    alone = str(pipeline.transcribe_step(pieces_of(audio[0], 7)[:1])[0])
    pipeline.reset_session()
    requests = [pieces_of(audio[0], stream)[0] for stream in range(4)]
    requests[1] = replace(requests[1], options=None)
    outputs = pipeline.transcribe_step([*requests, pieces_of(audio[0], 4)[0]])
    assert [isinstance(output, FailedStep) for output in outputs] == [False, True, False, False, True]
    assert 'streaming.num_slots is 3' in outputs[4].error
    assert {str(outputs[index]) for index in (0, 2, 3)} == {alone}


def test_an_interrupted_step_closes_its_streams_only(saved, audio):
    pipeline = without_streams(saved('ctc', 'one context'))
    first, second = pieces_of(audio[0], 1), pieces_of(audio[2], 2)
    alone = [str(pipeline.transcribe_step([piece])[0]) for piece in first]
    assert str(pipeline.transcribe_step(first[:1])[0]) == alone[0]
    with mock.patch.object(pipeline.session, 'step', side_effect=MemoryError), pytest.raises(MemoryError):
        pipeline.transcribe_step(second[:1])
    assert [str(pipeline.transcribe_step([piece])[0]) for piece in first[1:]] == alone[1:]
    assert isinstance(pipeline.transcribe_step(second[1:2])[0], FailedStep)


def test_empty_pieces_change_nothing(saved, audio):
    pipeline = without_streams(saved('ctc', 'one context'))
    *pieces, last = pieces_of(audio[0], 1)
    expected = [pipeline.transcribe_step([piece])[0] for piece in [*pieces, last]]
    nothing = Frame(torch.zeros(0), 1)
    outputs = [pipeline.transcribe_step([piece])[0] for piece in pieces]
    assert not pipeline.transcribe_step([nothing])[0].final_transcript
    outputs.append(pipeline.transcribe_step([replace(last, is_last=False)])[0])
    end = pipeline.transcribe_step([replace(nothing, is_last=True)])[0]
    assert end.final_transcript == expected[-1].final_transcript
    assert pipeline.transcribe_step([]) == []
