# SPDX-License-Identifier: Apache-2.0
"""The phones that a probe recognises."""

# ARPAbet without stress: the 39 phones of the CMU dictionary.
PHONES = (
    'AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH'
).split()
_LABELS = {phone: label for label, phone in enumerate(PHONES)}


def labels_of(phones: str, where: str = 'phones') -> list[int]:
    """Return the index of each phone.

    Args:
        phones: with spaces between them; digits behind a vowel, its stress, are dropped.
        where: what an error calls them.

    Raises:
        ValueError: naming a phone that is none of ``PHONES``.
    """
    names = [phone.rstrip('012') for phone in phones.split()]
    unknown = [name for name in names if name not in _LABELS]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is no phone; it must be one of {' '.join(PHONES)}")
    return [_LABELS[name] for name in names]
