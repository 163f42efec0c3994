# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from attention_windows import attended
from hypothesis import given
from hypothesis import strategies as st

from nemo.collections.asr.modules.ssl_modules.masking import RandomBlockMasking
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.visible_frames import (
    follows_context,
    kept_visible_frames,
    masked_share_per_frame,
    no_visible_frame,
    window_of_masking,
)
from nemo.collections.asr.parts.att_context.windows import Window


def past(left):
    """The window of so many frames before a frame."""
    return Window(AttContext(left, 0))


def brute_force(share, left, threshold):
    """Look, for each masked frame, at every other frame of its window."""
    answer = []
    for frame, value in enumerate(share):
        window = range(0 if left < 0 else max(0, frame - left), frame)
        answer.append(value > threshold and not any(share[other] == 0 for other in window))
    return answer


class TestMaskedShare:
    def test_by_eye(self):
        masks = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]]).unsqueeze(1).expand(1, 3, 14)
        assert masked_share_per_frame(masks, 4).tolist() == [[1.0, 0.25, 0.0]]  # the last two are no whole frame
        assert masked_share_per_frame(masks, 1).tolist() == masks[:, 0].tolist()

    @pytest.mark.parametrize('dtype', [torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float64])
    def test_dtype(self, dtype):
        share = masked_share_per_frame(torch.ones(2, 80, 16).to(dtype), 8)
        assert share.dtype == torch.float32 and share.tolist() == [[1, 1], [1, 1]]


class TestNoVisibleFrame:
    @given(
        st.lists(st.sampled_from([0.0, 0.5, 0.8, 0.875, 1.0]), max_size=12),
        st.integers(-1, 14),
        st.sampled_from([0.4, 0.8, 0.9]),
    )
    def test_brute_force(self, share, left, threshold):
        batch = [share, share[::-1]]
        found = no_visible_frame(torch.tensor(batch), past(left), threshold)
        assert found.tolist() == [brute_force(utterance, left, threshold) for utterance in batch]


def kept(context, style, frames, end, phase):
    found = kept_visible_frames(
        Window(AttContext(*context), style),
        torch.arange(frames).unsqueeze(0),
        torch.tensor([[end]]),
        torch.tensor([[phase]]),
    )
    return ''.join('x' if frame else '.' for frame in found[0].tolist())


@st.composite
def windows(draw):
    """A window that is limited on one side at least, of either style."""
    style = draw(st.sampled_from(['regular', 'chunked_limited']))
    right = draw(st.integers(-1, 6))
    left = draw(st.integers(-1 if right >= 0 else 0, 8))
    if style == 'chunked_limited' and right >= 0 and left > 0:
        left = left // (right + 1) * (right + 1)
    return (left, right), style


class TestKeptVisible:
    @given(windows(), st.integers(1, 40), st.integers(0, 10), st.floats(0, 1, exclude_max=True, width=32))
    def test_every_frame_of_an_utterance_sees_one_within_it(self, window, end, padding, phase):
        context, style = window
        found = kept(context, style, end + padding, end, phase)
        sees = attended(context, style, end)
        for frame in range(end):
            assert any(found[other] == 'x' for other in range(end) if sees[frame, other]), (found, frame)

    @pytest.mark.parametrize('context, style', [((3, 0), 'regular'), ((4, 4), 'regular'), ((8, 3), 'chunked_limited')])
    def test_any_frame_may_be_one_and_their_share_is_known(self, context, style):
        phases = torch.arange(0.005, 1, 0.01).unsqueeze(1)
        window = Window(AttContext(*context), style)
        found = kept_visible_frames(window, torch.arange(1200).unsqueeze(0), torch.full((100, 1), 1200), phases)
        assert found.any(dim=0).all()
        assert found.float().mean() == pytest.approx(1 / window.frames, rel=0.02)


class Plain(torch.nn.Module):
    def forward(self, input_feats, input_lengths):
        return input_feats, input_lengths


class TakesLeftContext(torch.nn.Module):
    def forward(self, input_feats, input_lengths, current_frame=None, effective_left_context=None):
        return input_feats, input_lengths


class PassesOn(TakesLeftContext):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class TestWindowOfMasking:
    def test_who_follows_a_context(self):
        for masking in (RandomBlockMasking(8), TakesLeftContext(), PassesOn()):
            assert follows_context(masking)
        assert not follows_context(Plain())

    @pytest.mark.parametrize(
        'configured, context, expected',
        [(-1, (-1, 0), -1), (-1, (20, 0), 20), (7, (-1, 0), 7), (7, (20, 0), 7), (7, (5, 0), 5), (6, (8, 1), 6)],
    )
    def test_the_tighter_left_context_holds(self, configured, context, expected):
        masking = RandomBlockMasking(8, left_context_size=configured)
        window = window_of_masking(masking, Window(AttContext(*context), 'chunked_limited'))['effective_window']
        assert tuple(window.context) == (expected, context[1])

    def test_other_modules_get_a_left_context_or_nothing(self):
        window = Window(AttContext(8, 3), 'chunked_limited')
        assert window_of_masking(TakesLeftContext(), window) == {'effective_left_context': 8}
        assert window_of_masking(TakesLeftContext(), Window(AttContext(-1, -1))) == {'effective_left_context': None}
        assert window_of_masking(TakesLeftContext(), None) == window_of_masking(Plain(), window) == {}
