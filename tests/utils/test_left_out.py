# SPDX-License-Identifier: Apache-2.0
"""Counts from all processes of a rank come together."""

import multiprocessing
import tempfile

import pytest

from nemo.utils.left_out import LEFT_OUT, LeftOut


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_counts_of_other_processes_arrive(tmp_path, monkeypatch, method):
    monkeypatch.setattr(LEFT_OUT, 'path', str(tmp_path / 'left_out'))
    LEFT_OUT.add('not finite', 'a.wav')
    LEFT_OUT.add('unreadable', 'b.wav')
    process = multiprocessing.get_context(method).Process(target=LEFT_OUT.add, args=('unreadable', 'c.wav', 3))
    process.start()
    process.join()
    assert LEFT_OUT.reasons() == {'not finite': (1, 'a.wav'), 'unreadable': (4, 'b.wav')}
    assert LEFT_OUT.total() == 5 and '4 unreadable (first: b.wav)' in LEFT_OUT.summary()


def test_nothing_is_counted_and_no_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    counter = LeftOut()
    assert counter.total() == 0 and 'no utterance' in counter.summary() and not list(tmp_path.iterdir())
    counter.add('unreadable', 'a.wav')
    counter.clear()
    assert counter.total() == 0
