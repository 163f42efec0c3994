# SPDX-License-Identifier: Apache-2.0
"""Which tokens make a word is what NeMo's tokenizers and decodings say."""

import pytest
import sentencepiece
from omegaconf import OmegaConf

from nemo.collections.asr.parts.streaming.words import Spelling, Token, Word
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


def test_pieces_that_begin_with_a_mark_begin_words(pieces):
    decoding, tokenizer = pieces
    spelling = Spelling(decoding, 0.08)
    for sentence in SENTENCES:
        ids = tokenizer.text_to_ids(sentence)
        assert len(ids) > len(sentence.split())  # some words have several pieces
        tokens = [Token(token, 3 * index) for index, token in enumerate(ids)]
        words = spelling.words(tokens)
        assert [word.text for word in words] == sentence.split() and spelling.text(tokens) == sentence
        assert words[0].start == 0 and words[-1].end == pytest.approx(0.08 * (3 * len(ids) - 2))


def test_spaces_separate_the_words_of_characters():
    labels = [' ', 'a', 'b']
    spelling = Spelling(CTCDecoding(OmegaConf.create({'strategy': 'greedy'}), labels), 0.08)
    tokens = [Token(token, frame) for token, frame in [(0, 0), (1, 1), (2, 4), (0, 5), (0, 6), (2, 10)]]
    assert spelling.words(tokens) == [Word('ab', 0.08, 0.4), Word('b', 0.8, 0.88)]
    assert spelling.words([]) == [] and spelling.text([]) == ''
