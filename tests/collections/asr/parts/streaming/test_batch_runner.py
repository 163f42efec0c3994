# SPDX-License-Identifier: Apache-2.0
"""Streams of one batch in any phase: each is as it would be alone."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_streams import CASES, calls_of, check_row, model_of, noise

from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession

CASES_HERE = ['regular', 'look-ahead', 'chunked', 'schedule, look-ahead']


@settings(max_examples=15)
@given(st.data())
def test_streams_that_join_end_and_begin_anew_at_any_time_equal_offline(data):
    case = data.draw(st.sampled_from(CASES_HERE))
    context = data.draw(st.sampled_from(CASES[case][1]))
    batch = data.draw(st.sampled_from([2, 3, 9]))  # of 9 an idle row is computed, too
    model, samples = model_of(case), noise(batch, 120000, seed=batch)
    session = StreamingSession(model, batch, context)
    begin, position, encoded = np.zeros(batch, int), np.zeros(batch, int), [[] for _ in range(batch)]
    for _ in range(data.draw(st.integers(2, 8))):
        count = data.draw(st.lists(st.integers(0, 9000), min_size=batch, max_size=batch))
        ends = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
        count = [0 if over else number for over, number in zip(session.ended, count)]
        piece = torch.stack([samples[row, start : start + 9000] for row, start in enumerate(position)])
        output = session.step(piece, count, ends)
        for row, length in enumerate(output.lengths.tolist()):
            encoded[row].append(output.encoded[row, :, :length])
        position += count
        again = [row for row, over in enumerate(session.ended) if over and data.draw(st.booleans())]
        for row in again:
            check_row(model, context, samples[row : row + 1, begin[row] : position[row]], encoded[row])
            begin[row], encoded[row] = position[row], []
        session.reset(again)
    if not all(session.ended):
        output = session.finish()
        for row, length in enumerate(output.lengths.tolist()):
            encoded[row].append(output.encoded[row, :, :length])
    for row, start in enumerate(begin):
        check_row(model, context, samples[row : row + 1, start : position[row]], encoded[row])


def test_a_step_has_no_python_of_its_own_for_each_stream():
    """16 streams in as many phases make a step as many calls as 9 do; more are taken 16 at a time by the convolutions."""

    def calls(batch):
        session = StreamingSession(model_of('regular'), batch, [4, 0])
        phases = [37 * row % 1280 for row in range(batch)]
        session.step(noise(batch, 1280), phases)
        for _ in range(20):  # until all phases have come
            session.step(noise(batch, 1280))
        samples = noise(batch, 1280)
        return calls_of(lambda: session.step(samples))

    assert abs(calls(16) - calls(9)) < 7
    assert calls(64) - calls(48) == calls(48) - calls(32)


def test_minutes_are_taken_at_once_in_bounded_memory():
    session = StreamingSession(model_of('regular'), 1, [4, 0])
    before = session.cache_bytes_per_stream
    output = session.step(noise(1, 5 * 60 * 16000))
    assert output.lengths.item() == 5 * 60 * 16000 // 1280 and session.cache_bytes_per_stream == before
    parts = [session.step(piece) for piece in noise(1, 9600).split(1280, dim=1)]
    assert StreamingOutput.concatenate(parts).lengths.item() == 8
