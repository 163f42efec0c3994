# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of word pieces, made in a moment."""

from pathlib import Path

import numpy as np
import sentencepiece

LETTERS = list('abcdefghijklmnop')


def make_tokenizer(folder: Path, pieces: int = 64) -> Path:
    """Train a tokenizer on words that nobody says; returns its folder, as ``model.tokenizer.dir`` wants it."""
    random = np.random.default_rng(0)
    words = [''.join(random.choice(LETTERS, size=random.integers(2, 6))) for _ in range(300)]
    text = folder / 'text.txt'
    text.write_text('\n'.join(' '.join(random.choice(words, size=8)) for _ in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / 'tokenizer'),
        vocab_size=pieces,
        model_type='bpe',
        character_coverage=1.0,
        minloglevel=2,
    )
    made = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
    # NeMo reads a list of the pieces beside it
    (folder / 'vocab.txt').write_text('\n'.join(made.id_to_piece(index) for index in range(1, made.get_piece_size())))
    return folder
