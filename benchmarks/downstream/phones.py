# SPDX-License-Identifier: Apache-2.0
"""The phones as single characters, so that NeMo's recognisers of characters recognise phones; and their errors."""

import string
from collections.abc import Sequence

import torch
from torchmetrics.functional.text import edit_distance

# ARPAbet without stress: the 39 phones of the CMU dictionary.
PHONES = (
    'AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH'
).split()
CHARACTERS = string.ascii_letters[: len(PHONES)]
_CHARACTER_OF = dict(zip(PHONES, CHARACTERS))


def spell(phones: str, where: str = 'phones') -> str:
    """Return a character for each phone.

    Args:
        phones: with spaces between them; digits behind a vowel, its stress, are dropped.
        where: what an error calls them.

    Raises:
        ValueError: naming a phone that is none of ``PHONES``.
    """
    names = [phone.rstrip('012') for phone in phones.split()]
    unknown = [name for name in names if name not in _CHARACTER_OF]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is no phone; it must be one of {' '.join(PHONES)}")
    return ''.join(_CHARACTER_OF[name] for name in names)


def read_path(path: torch.Tensor) -> str:
    """Return the characters of a greedy CTC path [A]: repetitions once, and no blanks, the class behind the phones."""
    return ''.join(CHARACTERS[token] for token in path.unique_consecutive().tolist() if token < len(CHARACTERS))


def errors(heard: Sequence[str], said: Sequence[str]) -> list[int]:
    """Return how many phones were put in, left out or taken for others in each utterance, at the least."""
    if not heard:
        return []
    return edit_distance(list(heard), list(said), reduction='none').int().tolist()
