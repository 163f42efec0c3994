# SPDX-License-Identifier: Apache-2.0
"""Which tokens make a word is what NeMo's tokenizers and decodings say."""

import pytest
import sentencepiece
from omegaconf import OmegaConf

from nemo.collections.asr.parts.streaming.text import Spelling, TextUpdate, Word
from nemo.collections.asr.parts.submodules.ctc_decoding import CTCBPEDecoding, CTCBPEDecodingConfig, CTCDecoding
from nemo.collections.common.tokenizers import SentencePieceTokenizer

SENTENCES = ['turn on the light', 'turn off the radio', 'the light in the garden', 'call anna at nine']


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
    """A decoding of SentencePiece tokens, and its tokenizer."""
    folder = tmp_path_factory.mktemp('tokenizer')
    (folder / 'text.txt').write_text('\n'.join(SENTENCES * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / 'text.txt'), model_prefix=str(folder / 'tokenizer'), vocab_size=40, model_type='bpe'
    )
    tokenizer = SentencePieceTokenizer(str(folder / 'tokenizer.model'))
    tokenizer.tokenizer.vocab_size = len(tokenizer.vocab)  # as NeMo's models of such tokens do
    return CTCBPEDecoding(OmegaConf.structured(CTCBPEDecodingConfig()), tokenizer), tokenizer


def words_of(spelling, tokens, frames):
    """Cut tokens where a word begins, as text does."""
    starts = [index for index, token in enumerate(tokens) if not index or spelling.begins_word(token)]
    bounds = [slice(*pair) for pair in zip(starts, [*starts[1:], len(tokens)])]
    return [spelling.word(tokens[bound], frames[bound], [0.5] * len(tokens[bound])) for bound in bounds]


def test_pieces_that_begin_with_a_mark_begin_words(pieces):
    decoding, tokenizer = pieces
    spelling = Spelling(decoding, 0.08)
    for sentence in SENTENCES:
        tokens = tokenizer.text_to_ids(sentence)
        assert len(tokens) > len(sentence.split())  # some words have several pieces
        words = words_of(spelling, tokens, range(0, 3 * len(tokens), 3))
        assert [word.text for word in words] == sentence.split() and spelling.text(tokens) == sentence
        assert words[0].start == 0 and words[-1].end == pytest.approx(0.08 * (3 * len(tokens) - 2))


def test_spaces_separate_the_words_of_characters():
    labels = [' ', 'a', 'b']
    spelling = Spelling(CTCDecoding(OmegaConf.create({'strategy': 'greedy'}), labels), 0.08)
    words = words_of(spelling, [0, 1, 2, 0, 0, 2], [0, 1, 4, 5, 6, 10])
    assert words == [Word('ab', 0.08, 0.4, 0.5), None, Word('b', 0.8, 0.88, 0.5)]
    assert spelling.word([], [], []) is None and spelling.text([]) == ''


def test_updates_of_steps_are_joined():
    first, second = TextUpdate([Word('a', 0, 1)], Word('b', 1, 2), [0.5]), TextUpdate([Word('be', 1, 3)])
    assert TextUpdate.concatenate([first, second]) == TextUpdate([Word('a', 0, 1), Word('be', 1, 3)], None, [0.5])
