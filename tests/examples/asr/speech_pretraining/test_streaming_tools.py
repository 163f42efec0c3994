# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_nest import tiny_model


@pytest.fixture(scope='module')
def tools(load_example):
    return load_example('streaming_tools')


@pytest.mark.unit
def test_the_parity_line(tools, audio_folder):
    model = tiny_model().eval()
    line = tools.parity_line(tools.stream_one(model, audio_folder / 'mono.wav'))
    assert 'Streamed 1.0 s in context [10, 0]: largest difference to offline' in line and '100.00%' in line


@pytest.mark.unit
@pytest.mark.parametrize(
    ('times', 'expected'),
    [([], [None, None, None]), ([4.0], [4.0, 4.0, 4.0]), ([float(n) for n in range(40, 0, -1)], [21.0, 39.0, 40.0])],
)
def test_figures_of_the_steps_times(tools, times, expected):
    output = SimpleNamespace(lengths=torch.tensor([7]))
    figures = tools.Streamed([4, 0], 12.5, seconds=2.0, chunk_ms=times, output=output).figures()
    assert [figures[f'chunk_ms_{name}'] for name in ('p50', 'p95', 'max')] == expected
    assert figures['frames'] == 7 and figures['real_time_factor'] == pytest.approx(sum(times) / 2000, abs=1e-4)


@pytest.mark.unit
def test_audio_too_long_for_offline_is_not_compared(tools, capsys):
    streamed = tools.Streamed([4, 0], 12.5, seconds=301.0)
    tools.compare_with_offline(None, np.zeros(1, np.float32), streamed)
    assert streamed.largest_difference is None and 'longer than 300 s' in capsys.readouterr().err
