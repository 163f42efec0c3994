# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo.collections.common.parts.preprocessing.parsers import make_parser


@pytest.fixture(scope='module')
def phones(load):
    return load('phones')


def test_each_phone_is_one_character_that_nemos_parser_takes_as_it_is(phones):
    assert len(set(phones.PHONES)) == len(set(phones.CHARACTERS)) == 39
    text = phones.spell(' '.join(phones.PHONES))
    assert text == phones.CHARACTERS
    assert make_parser(list(phones.CHARACTERS), do_normalize=False)(text) == list(range(39))


def test_stress_is_dropped_and_what_is_no_phone_is_refused(phones):
    assert phones.spell('B EH0 R') == phones.spell('B EH1 R') == phones.spell('B EH R')
    with pytest.raises(ValueError, match="x.wav: 'QQ' is no phone"):
        phones.spell('B QQ', 'x.wav')


def test_a_path_is_read_without_blanks_and_repetitions(phones):
    blank = len(phones.CHARACTERS)
    path = torch.tensor([blank, 0, 0, blank, 0, 1, 1, 2, blank])
    assert phones.read_path(path) == phones.spell('AA AA AE AH')
    assert phones.read_path(torch.full((3,), blank)) == phones.read_path(torch.tensor([], dtype=torch.long)) == ''


@pytest.mark.parametrize(
    'heard, said, errors',
    [
        ('B EH R', 'B EH R', 0),
        ('B R', 'B EH R', 1),  # left out
        ('B EH EH R', 'B EH R', 1),  # put in
        ('P EH R', 'B EH R', 1),  # taken for another
        ('', 'B EH R', 3),
        ('EH R B', 'B EH R', 2),  # one left out, one put in
        ('S IY', 'B EH R', 3),
    ],
)
def test_errors_by_hand(phones, heard, said, errors):
    assert phones.errors([phones.spell(heard)], [phones.spell(said)]) == [errors]


def test_errors_are_counted_utterance_by_utterance(phones):
    assert phones.errors(['ab', '', 'abc'], ['ab', 'ab', 'xbc']) == [0, 2, 1]
    assert phones.errors([], []) == []
