# SPDX-License-Identifier: Apache-2.0
import itertools
import random
import re

import pytest


@pytest.fixture(scope='module')
def sentences(load_example):
    return load_example('corpus_sentences')


def drawn(sentences, split, count=500):
    rng = random.Random(0)
    return [sentences.make_sentence(rng, split) for _ in range(count)]


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_every_slot_is_filled(sentences, split):
    assert all(re.fullmatch(r"[A-Z][a-z' ]+\.", sentence) for sentence in drawn(sentences, split))


def test_no_sentence_is_in_two_splits_and_words_are_few(sentences):
    splits = {split: set(drawn(sentences, split, 2000)) for split in ('train', 'validation', 'test')}
    words = {split: set(' '.join(map(sentences.transcript, texts)).split()) for split, texts in splits.items()}
    assert not any(splits[one] & splits[other] for one, other in itertools.combinations(splits, 2))
    assert words['validation'] | words['test'] <= words['train'] and 80 < len(words['train']) < 200


def test_every_slot_of_the_grammar_can_be_reached(sentences):
    used = set(re.findall(r'{(\w+)}', '|'.join(sentences.GRAMMAR.values())))
    assert used | {'sentence'} == set(sentences.GRAMMAR)


def test_a_transcript_is_what_was_said(sentences):
    assert sentences.transcript("Wake me at five o'clock  on Monday.") == "wake me at five o'clock on monday"
