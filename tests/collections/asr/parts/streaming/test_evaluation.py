# SPDX-License-Identifier: Apache-2.0
import math

from live_streams import noise
from tiny_nest import tiny_model
from tiny_recogniser import tiny_recogniser

from nemo.collections.asr.parts.streaming.evaluation import (
    StreamMeasures,
    measure_stream,
    streamable_contexts,
    summarize_streams,
)

RATE = 16000


def measures(**values):
    return StreamMeasures([4, 0], seconds=2.0, look_ahead_ms=12.5, cache_bytes=8, **values)


def test_a_stream_of_next_tokens_equals_offline_and_has_a_surprise():
    model, samples = tiny_model('+model.objective=next_token').eval(), noise(1, 3 * RATE)[0].numpy()
    found = measure_stream(model, samples, [4, 0], 0.08, return_surprise=True)
    assert found.largest_difference <= 1e-4 and found.token_agreement == 1.0
    assert len(found.step_ms) == math.ceil(3 / 0.08) and found.cache_bytes > 0 and found.text is None
    model.target_normalize = None
    settled = measure_stream(model, samples, [4, 0], return_surprise=True)
    assert len(settled.surprise) - len(found.surprise) == 25  # two seconds, where targets are normalised


def test_a_recogniser_has_text_and_latencies(no_small_weights):
    model, samples = tiny_recogniser('ctc'), noise(1, 2 * RATE)[0].numpy()
    found = measure_stream(model, samples, [10, 0], return_text=True)
    summary = summarize_streams([found], [found.text])
    assert len(found.text) > 3 and summary['wer'] == summary['cer'] == 0.0
    assert 0 < summary['word_latency_ms_p50'] <= summary['word_latency_ms_p95']
    other = measure_stream(model, samples, [10, 0], weights='int8')
    assert 1e-3 < other.largest_difference < 1


def test_figures_of_several_audios_are_joined():
    first = measures(step_ms=[1.0, 3.0], text='a b', surprise=[1.0, 2.0], largest_difference=1e-6, token_agreement=1.0)
    second = measures(step_ms=[2.0], text='b', surprise=[6.0], largest_difference=3e-6, token_agreement=0.5)
    found = summarize_streams([first, second], ['a c', None])
    assert (found['step_ms_p50'], found['step_ms_p100'], found['seconds']) == (2.0, 3.0, 4.0)
    assert (found['wer'], found['surprise'], found['real_time_factor']) == (0.5, 3.0, 0.0015)
    assert (found['largest_difference'], found['token_agreement']) == (3e-6, 0.5)
    nothing = summarize_streams([measures()], [None])
    assert {nothing[name] for name in ('wer', 'surprise', 'step_ms_p50', 'largest_difference')} == {None}


def test_contexts_that_need_the_whole_utterance_are_left_out():
    model = tiny_model('model.encoder.att_context_size=[[8,0],[8,2],[-1,-1]]')
    assert streamable_contexts(model) == [[8, 0], [8, 2]]
