# SPDX-License-Identifier: Apache-2.0
"""Counts from all processes of a rank come together."""

import multiprocessing
import tempfile

from nemo.utils.left_out import LeftOut


def test_counts_of_other_processes_arrive(left_out):  # of spawned ones, see test_training_data_mixin.py
    left_out.add('not finite', 'a.wav')
    left_out.add('unreadable', 'b.wav')
    process = multiprocessing.get_context('fork').Process(target=left_out.add, args=('unreadable', 'c.wav', 3))
    process.start()
    process.join()
    assert left_out.reasons() == {'not finite': (1, 'a.wav'), 'unreadable': (4, 'b.wav')}
    assert left_out.total() == 5 and '4 unreadable (first: b.wav)' in left_out.summary()


def test_nothing_is_counted_and_no_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    counter = LeftOut()
    assert counter.total() == 0 and 'no utterance' in counter.summary() and not list(tmp_path.iterdir())
    counter.add('unreadable', 'a.wav')
    counter.clear()
    assert counter.total() == 0
