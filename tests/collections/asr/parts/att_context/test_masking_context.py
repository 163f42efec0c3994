# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo.collections.asr.modules.ssl_modules.masking import RandomBlockMasking
from nemo.collections.asr.parts.att_context import AttContext
from nemo.collections.asr.parts.att_context.masking_context import (
    follow_left_context,
    followed_left_context,
    follows_context,
    window_arguments,
)
from nemo.collections.asr.parts.att_context.windows import Window


class Plain(torch.nn.Module):
    """Knows nothing of contexts."""

    def forward(self, input_feats, input_lengths):
        return input_feats, input_lengths


class OfOtherPeople(torch.nn.Module):
    """Takes a left context, and keeps one, as the module of version 0.1 did."""

    left_context_size = -1

    def forward(self, input_feats, input_lengths, current_frame=None, effective_left_context=None):
        return input_feats, input_lengths


class PassesOn(RandomBlockMasking):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class HidesContexts(RandomBlockMasking):
    def forward(self, input_feats, input_lengths):
        return super().forward(input_feats, input_lengths)


def own(cls=RandomBlockMasking, **settings):
    return cls(feat_in=8, **settings)


def test_who_follows_a_context():
    assert follows_context(own()) and follows_context(own(PassesOn)) and follows_context(OfOtherPeople())
    assert not follows_context(Plain()) and not follows_context(own(HidesContexts))


@pytest.mark.parametrize(
    'configured, context, expected',
    [
        (-1, (-1, 0), None),
        (-1, (20, 0), 20),
        (7, (-1, 0), 7),
        (7, (20, 0), 7),
        (7, (5, 0), 5),
    ],
)
def test_masking_is_told_the_tightest_left_context_that_anybody_asks_for(configured, context, expected):
    masking = own(left_context_size=configured)
    assert window_arguments(masking, Window(AttContext(*context))) == {'effective_left_context': expected}


def test_a_look_ahead_is_told_to_those_who_take_it():
    window = Window(AttContext(8, 3), 'chunked_limited')
    assert window_arguments(own(), window) == {'effective_left_context': 8, 'effective_window': window}
    assert window_arguments(OfOtherPeople(), window) == {'effective_left_context': 8}
    assert window_arguments(own(), None) == window_arguments(own(), Window(AttContext(-1, -1)))


def test_what_is_followed_is_kept_beside_what_was_configured():
    masking, other = own(left_context_size=7), OfOtherPeople()
    for module in (masking, other):
        follow_left_context(module, 20)
        assert followed_left_context(module) == 20
    assert masking.left_context_size == 7 and other.left_context_size == 20
    assert followed_left_context(Plain()) is None
