# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_nest import tiny_model


@pytest.fixture(scope='module')
def tools(load_example):
    return load_example('streaming_tools')


def test_the_parity_line(tools, audio_folder):
    model = tiny_model().eval()
    line = tools.parity_line(tools.stream_one(model, audio_folder / 'mono.wav'))
    assert 'Streamed 1.0 s in context [10, 0]: largest difference to offline' in line and '100.00%' in line


@pytest.mark.parametrize(
    ('times', 'expected'),
    [([], [None, None, None]), ([4.0], [4.0, 4.0, 4.0]), ([float(n) for n in range(40, 0, -1)], [21.0, 39.0, 40.0])],
)
def test_figures_of_the_steps_times(tools, times, expected):
    output = SimpleNamespace(lengths=torch.tensor([7]), surprise=None, transcripts=None)
    figures = tools.Streamed([4, 0], 12.5, seconds=2.0, chunk_ms=times, output=output).figures()
    assert [figures[f'chunk_ms_{name}'] for name in ('p50', 'p95', 'max')] == expected
    assert figures['frames'] == 7 and figures['real_time_factor'] == pytest.approx(sum(times) / 2000, abs=1e-4)


def test_audio_too_long_for_offline_is_not_compared(tools, capsys):
    streamed = tools.Streamed([4, 0], 12.5, seconds=301.0)
    tools.compare_with_offline(None, np.zeros(1, np.float32), streamed)
    assert streamed.largest_difference is None and 'longer than 300 s' in capsys.readouterr().err


def step(start, *nats):
    return SimpleNamespace(
        surprise=torch.tensor([nats or []]),
        surprise_lengths=torch.tensor([len(nats)]),
        surprise_start=torch.tensor([start]),
    )


def test_each_second_is_told_when_the_next_one_begins(tools):
    meter = tools.SurpriseMeter(token_seconds=0.5, name='a.wav')
    assert list(meter.take(step(1, 2.0))) == [] == list(meter.take(step(2)))  # token 0 was predicted by none
    assert list(meter.take(step(2, 4.0, 6.0))) == ['a.wav  second 0: 2.00 nats per token, mean so far 2.00']
    told = list(meter.take(step(4, 1.0))) + list(meter.finish()) + list(meter.finish())
    assert told == [
        'a.wav  second 1: 5.00 nats per token, mean so far 4.00',
        'a.wav  second 2: 1.00 nats per token, mean so far 3.25',
    ]


def test_a_token_that_begins_with_a_second_belongs_to_it(tools):
    meter = tools.SurpriseMeter(token_seconds=0.04, name='')
    told = list(meter.take(step(0, *[1.0] * 100)))
    assert len(told) == 3  # 25 tokens in each second, and 25 wait


def test_the_ends_are_smoothed_over_what_there_is(tools):
    np.testing.assert_allclose(tools.smoothed(np.array([1.0, 2.0, 6.0, 0.0]), 3), [1.5, 3.0, 8 / 3, 3.0])
    np.testing.assert_allclose(tools.smoothed(np.array([4.0, 2.0]), 13), [3.0, 3.0])
    assert tools.smoothed(np.zeros(0), 3).shape == (0,)


def test_the_mean_leaves_out_what_is_not_settled(tools):
    meter = tools.SurpriseMeter(token_seconds=0.5, name='a.wav', settling=1.0)
    told = list(meter.take(step(0, 9.0, 9.0, 4.0, 2.0))) + list(meter.finish())
    assert told[0] == 'a.wav  second 0: 9.00 nats per token, settling'
    assert told[1] == 'a.wav  second 1: 3.00 nats per token, mean so far 3.00'

    streamed = tools.Streamed([4, 0], 12.5, output=step(1, 9.0, 4.0, 2.0), token_seconds=0.5, settling=1.0)
    assert streamed.surprise_seconds.tolist() == [0.5, 1.0, 1.5] and streamed.mean_surprise == 3.0
    streamed.settling = 2.0
    assert streamed.mean_surprise is None
    streamed.output = SimpleNamespace(surprise=None)
    assert streamed.mean_surprise is None


def test_tokens_settle_where_they_are_normalised_by_running_statistics(tools):
    assert tools.settling_seconds(SimpleNamespace(target_normalize='per_feature')) == 2.0
    assert tools.settling_seconds(SimpleNamespace(target_normalize=None)) == 0.0
