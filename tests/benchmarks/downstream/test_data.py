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


def test_crops_are_a_function_of_seed_and_step_and_no_speaker_of_the_test_is_trained_on(data):
    roles = {'pretraining': utterances(data, ('a', 20), ('b', 20)), 'validation': utterances(data, ('c', 2))}
    speech = data.Speech({**roles, 'probe': utterances(data, ('a', 2)), 'test': utterances(data, ('d', 2))})
    features, lengths = speech.crops(seed=1, step=5, number=3, frames=50)
    assert features.shape == (3, 80, 50) and lengths.tolist() == [50] * 3
    assert torch.equal(features, speech.crops(1, 5, 3, 50)[0])
    assert not torch.equal(features, speech.crops(1, 6, 3, 50)[0])
    with pytest.raises(ValueError, match='other data, too: c'):
        data.Speech({**roles, 'probe': roles['validation'], 'test': roles['validation']})


def test_phones_lose_their_stress_and_unknown_ones_are_refused(load):
    phones = load('phones')
    assert phones.labels_of('AA0 ZH IY1') == [0, 38, phones.PHONES.index('IY')]
    with pytest.raises(ValueError, match="here: 'XX'"):
        phones.labels_of('AA XX', 'here')
