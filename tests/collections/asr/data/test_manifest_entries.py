# SPDX-License-Identifier: Apache-2.0
"""Entries that are parsed on access are those that NeMo reads all at once."""

import json
import pickle

import pytest

from nemo.collections.asr.data import ssl_dataset
from nemo.collections.asr.data.manifest_entries import ManifestEntries
from nemo.collections.common.parts.preprocessing import collections

PARSE = ssl_dataset._up._parse_manifest_item
ROWS = [
    {'audio_filepath': 'a.wav', 'duration': 1.5, 'text': 'one', 'speaker': 'x', 'lang': 'en'},
    {'audio_filepath': '/there/b.wav', 'duration': 3, 'offset': 2.5, 'orig_sample_rate': 8000},
    {'audio_filename': 'ç.wav'},
    {'audio_filepath': 'd.wav', 'duration': 0.2, 'token_labels': [1, 2]},
    {'audio_filepath': 'e.wav', 'duration': 9.0},
]


@pytest.fixture
def manifests(tmp_path):
    """Two manifests of the same rows, with blank lines, one without an end of its last line."""
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    paths = [tmp_path / 'first.json', tmp_path / 'second.json']
    paths[0].write_text('\n'.join([lines[0], '', *lines[1:], '   ', '']), encoding='utf-8')
    paths[1].write_text('\n'.join(lines), encoding='utf-8')
    return [str(path) for path in paths]


@pytest.mark.parametrize(
    'limits', [{}, {'min_duration': 1.0}, {'max_duration': 3.0}, {'min_duration': 1.0, 'max_number': 3}]
)
def test_entries_are_nemos_in_another_process_too(manifests, limits):
    ours = ManifestEntries(manifests, PARSE, **limits)
    nemo = collections.ASRAudioText(manifests, parser=None, parse_func=PARSE, **limits)
    assert list(ManifestEntries([[path] for path in manifests], PARSE, **limits)) == list(
        ours
    )  # NeMo's form of buckets
    assert len(ours) == len(nemo) and list(ours) == list(nemo) == list(pickle.loads(pickle.dumps(ours)))
    assert ours[-1] == nemo[-1] and [ours[1], ours[2]] == nemo.data[1:3]
    with pytest.raises(IndexError):
        ours[len(nemo)]


def test_the_first_that_is_left_out_is_named_with_its_manifest(manifests, tmp_path, left_out):
    (tmp_path / 'good.json').write_text(json.dumps(ROWS[0]))
    ManifestEntries([str(tmp_path / 'good.json'), manifests[1]], PARSE, max_duration=3.0)
    [reason] = left_out.reasons().values()
    assert reason == (1, f'entry 5 of {manifests[1]}: 9.0 s')


def test_a_file_that_changes_while_it_is_used_is_an_error(manifests):
    entries = ManifestEntries(manifests, PARSE)
    with open(manifests[0], 'a') as file:
        file.write(json.dumps(ROWS[0]) + '\n')
    with pytest.raises(ValueError, match='first.json was changed while it is in use'):
        entries[0]
    assert len(ManifestEntries(manifests, PARSE)) == len(entries) + 1  # read anew


@pytest.mark.parametrize(
    'line, message',
    [
        ('{"audio', 'first.json, line 9 is no JSON'),
        ('[1]', 'first.json, line 9 is no JSON object'),
        ('{"audio_filepath": "", "duration": 1.0}', 'first.json, line 9 has no audio_filepath'),
        ('{"duration": "x"}', "first.json, line 9: duration is 'x'; it must be a number"),
    ],
)
def test_a_bad_line_is_named(manifests, line, message):
    with open(manifests[0], 'a') as file:
        file.write('\n' + line)
    with pytest.raises(ValueError, match=message):
        ManifestEntries(manifests, PARSE)
