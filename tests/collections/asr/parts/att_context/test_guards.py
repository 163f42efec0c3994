# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from attention_windows import attended
from hypothesis import given
from hypothesis import strategies as st

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.guards import guard_frames, share_of_guards
from nemo.collections.asr.parts.att_context.windows import Window


def guards(context, style, frames, end, phase):
    found = guard_frames(
        Window(AttContext(*context), style),
        torch.arange(frames).unsqueeze(0),
        torch.tensor([[end]]),
        torch.tensor([[phase]]),
    )
    return ''.join('x' if guard else '.' for guard in found[0].tolist())


@st.composite
def windows(draw):
    """A window that is limited on one side at least, of either style."""
    style = draw(st.sampled_from(['regular', 'chunked_limited']))
    right = draw(st.integers(-1, 6))
    left = draw(st.integers(-1 if right >= 0 else 0, 8))
    if style == 'chunked_limited' and right >= 0 and left > 0:
        left = left // (right + 1) * (right + 1)
    return (left, right), style


class TestGuardFrames:
    @given(windows(), st.integers(1, 40), st.integers(0, 10), st.floats(0, 1, exclude_max=True, width=32))
    def test_every_frame_of_an_utterance_sees_one_within_it(self, window, end, padding, phase):
        context, style = window
        found = guards(context, style, end + padding, end, phase)
        sees = attended(context, style, end)
        for frame in range(end):
            assert any(found[other] == 'x' for other in range(end) if sees[frame, other]), (found, frame)

    @pytest.mark.parametrize(
        'context, style, phase, expected',
        [
            ((3, 0), 'regular', 0.0, 'x...x...x...'),
            ((3, 0), 'regular', 0.5, 'x.x...x...x.'),  # the first frame has no past
            ((2, 1), 'regular', 0.25, '.x...x...x..'),
            ((0, 3), 'regular', 0.5, '..x...x...xx'),  # the last frame has no look-ahead
            ((-1, 2), 'regular', 0.5, '.x..........'),
            ((3, -1), 'regular', 0.5, '.........x..'),
            ((0, 3), 'chunked_limited', 0.5, '..x...x...x.'),
            ((4, 3), 'chunked_limited', 0.0, 'x.......x...'),
            ((4, 3), 'chunked_limited', 0.75, '..x...x.....'),
            ((-1, 3), 'chunked_limited', 0.75, '...x........'),
        ],
    )
    def test_by_eye(self, context, style, phase, expected):
        assert guards(context, style, 12, 12, phase) == expected

    def test_in_a_short_last_chunk_it_is_the_last_frame(self):
        assert guards((0, 3), 'chunked_limited', 8, 6, 0.75) == '...x.x..'

    @pytest.mark.parametrize('context, style', [((3, 0), 'regular'), ((4, 4), 'regular'), ((8, 3), 'chunked_limited')])
    def test_any_frame_may_be_one_and_their_share_is_known(self, context, style):
        phases = torch.arange(0.005, 1, 0.01).unsqueeze(1)
        window = Window(AttContext(*context), style)
        found = guard_frames(window, torch.arange(1200).unsqueeze(0), torch.full((100, 1), 1200), phases)
        assert found.any(dim=0).all()
        assert found.float().mean() == pytest.approx(share_of_guards(window), rel=0.02)
