# SPDX-License-Identifier: Apache-2.0
"""Rings on literal matrices: where positions lie, and what a query sees of them."""

import numpy as np
import pytest
import torch

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.streaming.ring_buffers import RingBuffer, RingWindow, Rows

CPU = torch.device('cpu')


def rows_of(*active):
    return Rows(np.array(active, bool), CPU)


def ring_of(batch, slots):
    return RingBuffer(batch, slots, dtype=torch.float32)


def test_positions_lie_at_their_remainder_and_only_counted_ones_exist():
    ring = ring_of(2, 4)
    ring.write(rows_of(1, 1), torch.tensor([[1.0, 2, 3], [5, 6, 0]]), np.array([3, 2]))
    ring.write(rows_of(1, 1), torch.tensor([[4.0, 9], [7, 8]]), np.array([1, 2]))
    assert ring.values.tolist() == [[9, 2, 3, 4], [5, 6, 7, 8]] and ring.count.tolist() == [4, 4]
    ring.write(rows_of(0, 1), torch.tensor([[9.0]]), np.array([1]))
    assert ring.values.tolist() == [[9, 2, 3, 4], [9, 6, 7, 8]] and ring.count.tolist() == [4, 5]
    assert ring.read(rows_of(1, 1), np.array([2, 3]), 2).tolist() == [[3, 4], [8, 9]]
    assert ring.read(rows_of(0, 1), np.array([3]), 2).tolist() == [[8, 9]]


def test_a_row_is_cleared_exported_and_loaded_elsewhere():
    ring, other = ring_of(3, 2), ring_of(1, 2)
    ring.write(rows_of(1, 1, 1), torch.tensor([[1.0, 2], [3, 4], [5, 6]]), np.array([2, 2, 1]))
    state = ring.export(2)
    other.check(state)
    other.load(0, state)
    ring.reset([0, 2])
    assert ring.values.tolist() == [[0, 0], [3, 4], [0, 0]] and ring.count.tolist() == [0, 2, 0]
    ring.reset([1], counts=False)
    assert not ring.values.any() and ring.count.tolist() == [0, 2, 0]
    assert other.values.tolist() == [[5, 6]] and other.count.tolist() == [1]
    for damaged, reason in [
        ({**state, 'count': -1}, 'RingBuffer.count is -1'),
        ({**state, 'values': torch.zeros(3)}, r'values is torch.float32 \[3\]'),
        ({**state, 'values': torch.zeros(2).double()}, r'values is torch.float64 \[2\]'),
        ({'count': 1}, r'must be like \[.count., .values.\]'),
    ]:
        with pytest.raises(ValueError, match=reason):
            other.check(damaged)


@pytest.mark.parametrize('active, selects', [([1] * 8, False), ([1] * 7 + [0], False), ([1] * 6 + [0] * 2, True)])
def test_a_few_idle_rows_are_computed_and_keep_what_they_have(active, selects):
    rows, kept = rows_of(*active), torch.arange(8.0).view(8, 1)
    assert (rows.index is not None) == selects and rows.is_whole == all(active)
    rows.store(kept, -rows.select(kept))
    assert kept.flatten().tolist() == [-row if moves else row for row, moves in enumerate(active)]


def seen(style, context, slots, wait, first, count, last=None) -> list[str]:
    """The slots as text, a line for each query: x hidden, o visible."""
    window = RingWindow(Window(AttContext(*context), style), slots, wait, CPU)
    visible = window.visible(np.array([first]), count, None if last is None else np.array([last]))
    columns = window.future + window.past + 1
    return [''.join('x' if age == columns else 'o' for age in query) for query in visible.ages.tolist()]


@pytest.mark.parametrize(
    'style, context, slots, wait, first, count, last, expected',
    [
        ('regular', (2, 0), 4, 0, 0, 2, None, ['oxxx', 'ooxx']),  # nothing before the stream starts
        ('regular', (2, 0), 4, 0, 8, 2, None, ['oxoo', 'ooxo']),  # slots hold 8 9 6 7
        ('regular', (2, 0), 4, 0, 9, 1, None, ['ooxo']),
        ('regular', (1, 1), 4, 1, 8, 1, None, ['oxoo']),  # 8 arrives, 7 is the query
        ('regular', (1, 1), 4, 1, 8, 1, 8, ['xxoo']),  # the stream ends before 8
        ('regular', (-1, 0), 4, 0, 3, 1, None, ['oooo']),
        ('chunked_limited', (2, 1), 4, 0, 8, 2, None, ['oooo', 'oooo']),
        ('chunked_limited', (0, 1), 4, 0, 8, 2, None, ['ooxx', 'ooxx']),
        ('chunked_limited', (2, 1), 4, 0, 0, 2, 1, ['oxxx', 'oxxx']),  # a last, short chunk
    ],
)
def test_what_queries_see(style, context, slots, wait, first, count, last, expected):
    assert seen(style, context, slots, wait, first, count, last) == expected


@pytest.mark.parametrize(
    'style, context, wait', [('regular', (3, 0), 0), ('regular', (2, 1), 1), ('chunked_limited', (2, 1), 0)]
)
def test_what_comes_again_is_computed_once_and_is_the_same(style, context, wait, monkeypatch):
    window = RingWindow(Window(AttContext(*context), style), 6, wait, CPU)
    phases = [np.array([start, 2 * start + 2]) for start in range(0, 40, 2)]
    for first in phases:
        window.visible(first, 2)
    expected = [window._visible(*window.compute(first, 2)) for first in phases]
    monkeypatch.setattr(RingWindow, 'compute', None)  # all phases are known
    for first, computed in zip(phases, expected):
        visible = window.visible(first, 2)
        assert (visible.began is None) == (computed.began is None)
        for given, wanted in zip(visible, computed):
            assert given is wanted is None or torch.equal(given, wanted)
