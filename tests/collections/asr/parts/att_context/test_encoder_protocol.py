# SPDX-License-Identifier: Apache-2.0
"""What an encoder must have to be followed, and what is read of one that has only NeMo's attributes."""

import re
from types import SimpleNamespace

import pytest
from tiny_nest import tiny_model

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.encoder_protocol import (
    FollowsContexts,
    tightest_window_of,
    why_context_is_unknown,
)
from nemo.collections.asr.parts.att_context.windows import Window


def test_the_patched_encoder_follows_contexts_and_tells_its_present_window():
    encoder = tiny_model('model.encoder.n_layers=2', '+model.encoder.layer_att_context_size=[[5,0],[20,0]]').encoder
    assert isinstance(encoder, FollowsContexts) and why_context_is_unknown(encoder) is None
    with encoder.using_att_context_size([10, 0]):
        assert tightest_window_of(encoder) == Window(AttContext(5, 0))


@pytest.mark.parametrize(
    ('attributes', 'window'),
    [
        ({'att_context_size': [40, 2]}, Window(AttContext(40, 2))),
        ({'att_context_size': (40, 2)}, Window(AttContext(40, 2))),
        (
            {'att_context_size': [8, 3], 'att_context_style': 'chunked_limited'},
            Window(AttContext(8, 3), 'chunked_limited'),
        ),
        ({'att_context_size': [[40, 0], [80, 0]]}, None),  # NeMo's list of several: none of them is the present one
        ({'att_context_size': 'many'}, None),
        ({'att_context_size': [40, 2], 'att_context_style': 'chunked_limited_with_rc'}, None),
        ({}, None),
    ],
)
def test_an_encoder_of_others_is_read_by_nemos_attributes(attributes, window):
    encoder = SimpleNamespace(**attributes)
    assert not isinstance(encoder, FollowsContexts)
    assert tightest_window_of(encoder) == window


@pytest.mark.parametrize(
    ('attributes', 'reason'),
    [
        ({}, 'its att_context_size is missing; it must be the present context'),
        ({'att_context_size': [[40, 0], [80, 0]]}, r'its att_context_size is \[\[40, 0\], \[80, 0\]\]'),
        (
            {'att_context_size': [40, 2], 'att_context_style': 'other'},
            'its att_context_style is other, whose windows are not known',
        ),
    ],
)
def test_what_an_encoder_lacks_is_named(attributes, reason):
    assert re.search(reason, why_context_is_unknown(SimpleNamespace(**attributes)))
