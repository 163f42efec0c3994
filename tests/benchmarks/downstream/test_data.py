# SPDX-License-Identifier: Apache-2.0
"""The speech of the comparison: joined utterances, chosen ones, crops."""

import pytest
import torch


@pytest.fixture(scope='module')
def data(load):
    return load('data')


def utterance(data, speaker, seconds, value=0.0, labels=()):
    return data.Utterance(torch.full((80, int(100 * seconds)), value).half(), list(labels), speaker)


def test_utterances_of_a_speaker_are_joined_until_they_are_long_enough(data):
    said = [utterance(data, who, seconds) for who, seconds in [('a', 3), ('b', 9), ('a', 3), ('a', 5), ('a', 1)]]
    assert [(one.speaker, one.seconds) for one in data.joined(said, 6)] == [('a', 6.0), ('a', 6.0), ('b', 9.0)]
    assert [one.seconds for one in data.joined(said, 3)] == [3.0, 3.0, 6.0, 9.0]


def test_the_probe_takes_short_utterances_of_the_speakers_in_turn(data):
    said = [utterance(data, who, seconds) for who, seconds in [('a', 2), ('a', 3), ('b', 8), ('b', 4), ('c', 5)]]
    found = data.chosen(said, minutes=9 / 60, longest=7)
    assert [(one.speaker, one.seconds) for one in found] == [('a', 2.0), ('c', 5.0), ('a', 3.0)]


def speech(data, **changes):
    roles = {
        'pretraining': [utterance(data, 'a', 20, 1.0), utterance(data, 'b', 20, 3.0)],
        'validation': [utterance(data, 'c', 2)],
        'probe': [utterance(data, 'a', 2, labels=[1])],
        'test': [utterance(data, 'd', 2, labels=[2])],
    }
    return data.Speech({**roles, **changes})


def test_a_speaker_of_the_test_in_other_data_is_refused(data):
    with pytest.raises(ValueError, match='speakers of the test are in other data, too: c'):
        speech(data, test=[utterance(data, 'c', 2)])


def test_crops_are_a_function_of_seed_and_step(data):
    made = speech(data)
    made.mean, made.std = torch.zeros(80, 1), torch.ones(80, 1)
    features, lengths = made.crops(seed=1, step=5, number=3, frames=50)
    assert features.shape == (3, 80, 50) and lengths.tolist() == [50] * 3
    assert torch.equal(features, made.crops(1, 5, 3, 50)[0])
    others = [made.crops(1, step, 3, 50)[0] for step in range(6, 12)]
    assert any(not torch.equal(features, other) for other in others)


def test_batches_are_normalised_and_padded_with_zeros(data):
    made = speech(data)
    made.mean, made.std = torch.full((80, 1), 1.0), torch.full((80, 1), 2.0)
    features, lengths = made.batch([torch.full((80, 2), 5.0), torch.full((80, 4), 3.0)])
    assert lengths.tolist() == [2, 4]
    assert features[:, 0].tolist() == [[2.0, 2.0, 0.0, 0.0], [1.0] * 4]


def test_a_manifest_without_a_speaker_is_refused(data, tmp_path):
    path = tmp_path / 'manifest.json'
    path.write_text('{"audio_filepath": "a.wav", "duration": 1}\n')
    with pytest.raises(ValueError, match='entry 1 has no speaker'):
        data.read_manifest(path)


def test_audio_that_cannot_be_read_is_named(data, tmp_path):
    path = tmp_path / 'manifest.json'
    path.write_text('{"audio_filepath": "none.wav", "duration": 1, "speaker": "a", "phones": "AH"}\n')
    with pytest.raises(ValueError, match='none.wav cannot be read'):
        data.extract(path)


def test_phones_lose_their_stress_and_unknown_ones_are_refused(load):
    phones = load('phones')
    assert phones.labels_of('AA0 ZH IY1') == [0, 38, phones.PHONES.index('IY')]
    with pytest.raises(ValueError, match="here: 'XX' is no phone"):
        phones.labels_of('AA XX', 'here')
