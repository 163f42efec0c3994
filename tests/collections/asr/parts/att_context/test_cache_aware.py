# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo.collections.asr.parts.att_context import AttContext
from nemo.collections.asr.parts.att_context.cache_aware import (
    CannotStreamError,
    check_streaming_chunk,
    largest_left_context,
    streaming_look_ahead,
)
from nemo.collections.asr.parts.att_context.windows import Window


def windows(*contexts, style='regular'):
    return [Window(AttContext(*context), style) for context in contexts]


def test_the_look_ahead_adds_up_over_layers_but_not_over_chunks():
    batch, *layers = windows((8, 2), (8, 2), (4, 1))
    assert streaming_look_ahead(batch, layers, convolution=0) == 3
    assert streaming_look_ahead(batch, layers, convolution=2) == 7
    batch, *layers = windows((8, 3), (8, 3), (4, 1), style='chunked_limited')
    assert streaming_look_ahead(batch, layers, convolution=0) == 3


@pytest.mark.parametrize(
    'style, contexts, message',
    [
        (
            'regular',
            [(8, -1), (8, 0), (8, -1)],
            r'att_context_size \[8, -1\] cannot be streamed: .* layer 1 is unlimited',
        ),
        ('chunked_limited', [(8, -1), (8, -1)], r'att_context_size \[8, -1\] cannot be streamed: it has no chunks'),
    ],
)
def test_what_needs_the_end_of_the_utterance_cannot_stream(style, contexts, message):
    batch, *layers = windows(*contexts, style=style)
    with pytest.raises(CannotStreamError, match=message):
        streaming_look_ahead(batch, layers, convolution=0)


def test_chunks_must_be_whole_and_leave_the_look_ahead():
    [chunks], [regular] = windows((8, 3), style='chunked_limited'), windows((8, 2))
    check_streaming_chunk(chunks, chunk_size=8, shift_size=8, look_ahead=3)
    with pytest.raises(CannotStreamError, match='chunk_size is 6; .* multiple of 4'):
        check_streaming_chunk(chunks, chunk_size=6, shift_size=6, look_ahead=3)
    check_streaming_chunk(regular, chunk_size=6, shift_size=2, look_ahead=4)
    with pytest.raises(CannotStreamError, match="leaves a look-ahead of 3 frames; .* add up to 4"):
        check_streaming_chunk(regular, chunk_size=6, shift_size=3, look_ahead=4)


@pytest.mark.parametrize(
    'style, contexts, expected',
    [
        ('regular', [(8, 0), (8, 0), (4, 0)], 8),
        ('regular', [(8, 0), (8, 0), (-1, 0)], 100),
        ('chunked_limited', [(6, 2), (6, 2), (3, 2)], 6),
        ('chunked_limited', [(6, 2), (-1, 2)], 102),
    ],
)
def test_the_cache_holds_the_largest_left_context_in_whole_chunks(style, contexts, expected):
    batch, *layers = windows(*contexts, style=style)
    assert largest_left_context(batch, layers, unlimited=100) == expected
