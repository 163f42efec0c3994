# SPDX-License-Identifier: Apache-2.0
"""The speech of the comparison: joined utterances, chosen ones, crops."""

import pytest
import torch


@pytest.fixture(scope='module')
def data(load):
    return load('data')


def utterances(data, *spoken):
    """An utterance of random features for each pair of speaker and seconds."""
    return [data.Utterance(torch.randn(80, int(100 * seconds)).half(), [1], who) for who, seconds in spoken]


def test_utterances_of_a_speaker_are_joined_until_they_are_long_enough(data):
    spoken = utterances(data, ('a', 3), ('b', 9), ('a', 3), ('a', 5), ('a', 1))
    assert [(one.speaker, one.seconds) for one in data.joined(spoken, 6)] == [('a', 6.0), ('a', 6.0), ('b', 9.0)]
    assert [one.seconds for one in data.joined(spoken, 3)] == [3.0, 3.0, 6.0, 9.0]


def test_the_probe_takes_short_utterances_of_the_speakers_in_turn(data):
    spoken = utterances(data, ('a', 2), ('a', 3), ('b', 8), ('b', 4), ('c', 5))
    found = data.chosen(spoken, minutes=9 / 60, longest=7)
    assert [(one.speaker, one.seconds) for one in found] == [('a', 2.0), ('c', 5.0), ('a', 3.0)]


def test_crops_are_a_function_of_seed_and_step_and_no_speaker_of_the_test_is_trained_on(data):
    roles = {'pretraining': utterances(data, ('a', 20), ('b', 20)), 'validation': utterances(data, ('c', 2))}
    speech = data.Speech({**roles, 'probe': utterances(data, ('a', 2)), 'test': utterances(data, ('d', 2))})
    features, lengths = speech.crops(seed=1, step=5, number=3, frames=50)
    assert features.shape == (3, 80, 50) and lengths.tolist() == [50] * 3
    assert torch.equal(features, speech.crops(1, 5, 3, 50)[0])
    assert not torch.equal(features, speech.crops(1, 6, 3, 50)[0])
    with pytest.raises(ValueError, match='other data, too: c'):
        data.Speech({**roles, 'probe': roles['validation'], 'test': roles['validation']})


def test_batches_are_normalised_and_padded_with_zeros(data):
    speech = data.Speech.__new__(data.Speech)
    speech.mean, speech.std = torch.full((80, 1), 1.0), torch.full((80, 1), 2.0)
    features, lengths = speech.batch([torch.full((80, 2), 5.0), torch.full((80, 4), 3.0)])
    assert lengths.tolist() == [2, 4] and features[:, 0].tolist() == [[2.0, 2.0, 0.0, 0.0], [1.0] * 4]


def test_phones_lose_their_stress_and_unknown_ones_are_refused(load):
    phones = load('phones')
    assert phones.labels_of('AA0 ZH IY1') == [0, 38, phones.PHONES.index('IY')]
    with pytest.raises(ValueError, match="here: 'XX'"):
        phones.labels_of('AA XX', 'here')
