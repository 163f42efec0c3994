# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo.collections.asr.parts.att_context.answerability import masked_share_per_frame, unanswerable_frames
from nemo.collections.asr.parts.att_context.context import AttContext
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

    @pytest.mark.parametrize('frames', [0, 3])
    def test_less_than_a_frame(self, frames):
        assert masked_share_per_frame(torch.ones(2, 5, frames), 4).shape == (2, 0)


class TestUnanswerable:
    @pytest.mark.parametrize(
        'left, expected',
        [(-1, [1, 0, 0, 0, 0, 0]), (0, [1, 0, 1, 1, 0, 1]), (1, [1, 0, 0, 1, 0, 1]), (2, [1, 0, 0, 0, 0, 1])],
    )
    def test_by_eye(self, left, expected):
        """One utterance; the fifth frame is partly masked: neither a question nor an answer."""
        share = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.5, 1.0]])
        assert unanswerable_frames(share, past(left)).int().tolist() == [expected]

    def test_threshold(self):
        share = torch.tensor([[0.8, 0.875]])
        assert unanswerable_frames(share, past(-1)).tolist() == [[False, True]]
        assert unanswerable_frames(share, past(-1), threshold=0.7).tolist() == [[True, True]]

    @given(
        st.integers(1, 3).flatmap(
            lambda batch: st.integers(0, 12).flatmap(
                lambda frames: st.lists(
                    st.lists(st.sampled_from([0.0, 0.5, 0.875, 1.0]), min_size=frames, max_size=frames),
                    min_size=batch,
                    max_size=batch,
                )
            )
        ),
        st.integers(-1, 14),
        st.sampled_from([0.4, 0.8, 0.9]),
    )
    def test_brute_force(self, share, left, threshold):
        found = unanswerable_frames(torch.tensor(share), past(left), threshold)
        assert found.tolist() == [brute_force(utterance, left, threshold) for utterance in share]

    def test_meta(self):
        masks = torch.ones(2, 80, 33, device='meta')
        assert unanswerable_frames(masked_share_per_frame(masks, 8), past(5)).shape == (2, 4)
