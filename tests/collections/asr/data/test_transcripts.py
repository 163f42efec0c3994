# SPDX-License-Identifier: Apache-2.0
"""What a recogniser cannot write is said before training."""

import gzip
import json

import pytest
from tiny_recogniser import tiny_recogniser
from word_pieces import make_tokenizer

from nemo.collections.asr.data.transcripts import characters_known_by, characters_of, report_unknown_characters


@pytest.fixture
def manifests(tmp_path):
    """Two manifests, the second compressed."""
    rows = [[{'text': 'ban'}, {'text': 'bean eb'}], [{'text': "nabe's"}, {'text': 'Bébé'}]]
    texts = [
        ''.join(json.dumps({'audio_filepath': 'a.wav', 'duration': 1.0, **row}) + '\n' for row in each)
        for each in rows
    ]
    (tmp_path / 'first.json').write_text(texts[0])
    (tmp_path / 'second.json.gz').write_bytes(gzip.compress(texts[1].encode()))
    return tmp_path


def test_the_characters_of_every_manifest_are_found(manifests):
    section = {'manifest_filepath': f'{manifests}/first.json,{manifests}/second.json.gz'}
    assert ''.join(characters_of(section)) == " 'Babensé"
    group = {'input_cfg': [{'type': 'nemo', 'manifest_filepath': f'{manifests}/first.json'}]}
    assert ''.join(characters_of(group)) == ' aben'


def test_unknown_characters_are_counted_and_named(manifests, warnings):
    section = {'manifest_filepath': [f'{manifests}/second.json.gz']}
    unknown = report_unknown_characters('model.validation_ds', section, characters_known_by(tiny_recogniser('ctc')))
    assert unknown == {"'": 1, 's': 1, 'B': 1, 'é': 2}
    assert len(warnings) == 1 and 'model.validation_ds: 2 of 2 texts' in warnings[0] and "'é' 2" in warnings[0]
    assert not report_unknown_characters('x', {'manifest_filepath': f'{manifests}/first.json'}, 'aben '.__contains__)
    assert len(warnings) == 1


def test_a_tokenizer_is_asked_for_its_pieces(manifests, tmp_path, warnings):
    model = tiny_recogniser('ctc', tokenizer=make_tokenizer(tmp_path))
    section = {'manifest_filepath': f'{manifests}/second.json.gz'}
    assert report_unknown_characters('model.test_ds', section, characters_known_by(model))['é'] == 2


def test_a_missing_text_is_named(tmp_path):
    (tmp_path / 'm.json').write_text('{"audio_filepath": "a.wav", "duration": 1}\n')
    with pytest.raises(ValueError, match='m.json, line 1 has no text'):
        characters_of({'manifest_filepath': str(tmp_path / 'm.json')})
