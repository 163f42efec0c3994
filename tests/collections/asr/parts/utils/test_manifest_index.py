# SPDX-License-Identifier: Apache-2.0
"""One process of a machine reads a large manifest, and the others find what it found; entries are in ``test_manifest_entries.py``."""

import gzip
import json
import multiprocessing
import os

import numpy as np
import pytest

from nemo.collections.asr.parts.utils import manifest_index
from nemo.collections.asr.parts.utils.manifest_index import ManifestIndex, read_entries


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """A manifest that counts as large, with a blank line, and a temporary folder of its own."""
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setattr(manifest_index, 'SHARED_FROM', 1)
    monkeypatch.setattr(manifest_index.tempfile, 'gettempdir', lambda: str(tmp_path / 'temporary'))
    return write(tmp_path / 'train.json', 300)


def write(path, count):
    rows = [json.dumps({'audio_filepath': f'{number}.wav', 'duration': number / 8}) for number in range(count)]
    path.write_text('\n\n'.join([rows[0], '\n'.join(rows[1:])]) + '\n')
    return path


def reading(monkeypatch):
    """How often the whole file is read from now on."""
    read, count = ManifestIndex._read, []
    monkeypatch.setattr(ManifestIndex, '_read', lambda index: count.append(1) or read(index))
    return count


def kept(manifest):
    return list((manifest.parent / 'temporary').rglob('*.npy'))


def test_a_second_process_finds_what_the_first_one_found(manifest, monkeypatch):
    reads = reading(monkeypatch)
    first, second = ManifestIndex(str(manifest)), ManifestIndex(str(manifest))
    assert len(reads) == 1 and len(kept(manifest)) == 1
    for index in (first, second):
        assert len(index) == 300 and json.loads(index.line(299))['audio_filepath'] == '299.wav'
        np.testing.assert_array_equal(index.durations, np.arange(300) / 8)
    monkeypatch.setattr(manifest_index, 'SHARED_FROM', 10**9)
    alone = ManifestIndex(str(manifest))
    np.testing.assert_array_equal(alone.starts, second.starts)
    assert len(reads) == 2


def _index(path, start, results):
    start.wait()
    results.put((os.getpid(), len(ManifestIndex(path))))


def test_ranks_that_start_at_once_leave_one_file(manifest):
    context = multiprocessing.get_context('fork')
    start, results = context.Event(), context.Queue()
    ranks = [context.Process(target=_index, args=(str(manifest), start, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    start.set()
    assert [results.get(timeout=60)[1] for _ in ranks] == [300] * 4
    for rank in ranks:
        rank.join()
    assert len(kept(manifest)) == 1


def test_a_changed_manifest_is_read_anew_and_takes_the_place_of_the_old(manifest, monkeypatch):
    ManifestIndex(str(manifest))
    (old,) = kept(manifest)
    write(manifest, 20)
    reads = reading(monkeypatch)
    assert len(ManifestIndex(str(manifest))) == 20 and len(reads) == 1
    (new,) = kept(manifest)
    assert new != old


def test_a_mistake_is_found_and_nothing_is_left(manifest):
    manifest.write_text(manifest.read_text() + 'no json\n')
    with pytest.raises(ValueError, match='line 302 is no JSON'):
        ManifestIndex(str(manifest))
    assert not kept(manifest)


def test_where_nothing_can_be_left_each_process_reads_for_itself(manifest, monkeypatch, warnings):
    monkeypatch.setattr(manifest_index.tempfile, 'gettempdir', lambda: str(manifest))  # a file
    assert len(ManifestIndex(str(manifest))) == 300
    assert any('Each process reads' in message for message in warnings)


def test_a_tilde_is_expanded_so_audio_beside_the_manifest_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'm.json').write_text('{"audio_filepath": "a.wav"}\n')
    assert [line.manifest for line in read_entries('~/m.json')] == [str(tmp_path / 'm.json')]


def test_entries_are_read_as_lhotse_reads_them(tmp_path):
    for number in range(2):
        rows = [json.dumps({'text': f'{number}\u2028é'}, ensure_ascii=False), '  ', json.dumps({'text': 'b'})]
        (tmp_path / f'{number}.json').write_text('\n'.join(rows) + '\n', encoding='utf-8')
    (tmp_path / 'all.jsonl.gz').write_bytes(gzip.compress((tmp_path / '0.json').read_bytes()))
    lines = list(read_entries(f'{tmp_path}/{{0..1}}.json'))
    assert [(line.number, line.entry['text']) for line in lines] == [
        (1, '0\u2028é'),
        (3, 'b'),
        (1, '1\u2028é'),
        (3, 'b'),
    ]
    assert [line.entry for line in read_entries(tmp_path / 'all.jsonl.gz')] == [line.entry for line in lines[:2]]
