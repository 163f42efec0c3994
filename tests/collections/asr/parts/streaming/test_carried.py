# SPDX-License-Identifier: Apache-2.0
"""States that sessions of one stream after the other saved go on as one batch."""

import pytest
import torch
from live_streams import CASES, model_of, noise

from nemo.collections.asr.parts.streaming.output import StreamingOutput
from nemo.collections.asr.parts.streaming.session import StreamingSession


@pytest.mark.parametrize('case', ['regular', 'look-ahead', 'factor 4', 'chunked', 'schedule, look-ahead'])
@pytest.mark.parametrize('heard', [0, 700, 1500, 14321, 40000])
def test_a_stream_goes_on_wherever_it_was(case, heard):
    model, samples = model_of(case), noise(2, 60000)
    for context in CASES[case][1]:
        before = StreamingSession(model, 2, context, fast='off')
        before.step(samples[:, :heard], [heard, heard // 3])
        after = StreamingSession(model, 2, context)
        after.load_state_dict(before.state_dict())
        assert after.current_frame.tolist() == before.current_frame.tolist()
        rest = [samples[:, heard : heard + 9000], samples[:, heard + 9000 :]]
        mine, expected = (
            StreamingOutput.concatenate([*(session.step(piece) for piece in rest), session.finish()])
            for session in (after, before)
        )
        assert mine.lengths.tolist() == expected.lengths.tolist()
        torch.testing.assert_close(mine.encoded, expected.encoded, atol=2e-5, rtol=0)


def test_streams_that_have_ended_stay_so():
    model = model_of('regular')
    before = StreamingSession(model, 2, [4, 0], fast='off')
    before.step(noise(2, 9000), [9000, 5000], [False, True])
    after = StreamingSession(model, 2, [4, 0])
    after.load_state_dict(before.state_dict())
    assert after.ended == (False, True)
    assert after.finish().lengths.tolist() == before.finish().lengths.tolist()
