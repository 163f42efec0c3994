# SPDX-License-Identifier: Apache-2.0
"""The characters of transcripts, and those that a recogniser cannot write. New in this project."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache

from nemo.collections.asr.data.data_checks import sources_in
from nemo.collections.asr.parts.utils.manifest_index import local_entries
from nemo.utils import logging


def texts_of(section) -> Iterator[str]:
    """Yield the texts of a data section's local manifests; ValueError names a line without text."""
    for _, source in sources_in(section):
        for line in local_entries(source.get('manifest_filepath')):
            if not isinstance(line.entry.get('text'), str):
                raise ValueError(f"{line.place} has no text")
            yield line.entry['text']


def characters_of(section) -> list[str]:
    """Return the characters of all texts of a data section, sorted; raise ValueError if there are none."""
    found = set().union(*texts_of(section))
    if not found:
        raise ValueError("the manifests have no texts; set model.labels")
    return sorted(found)


def report_unknown_characters(key: str, section, is_known: Callable[[str], bool]) -> Counter:
    """Log which characters of a section's texts a recogniser cannot write, and how often each occurs."""
    texts, affected, is_known = 0, 0, lru_cache(None)(is_known)
    unknown: Counter[str] = Counter()
    for text in texts_of(section):
        found = [character for character in text if not is_known(character)]
        texts, affected = texts + 1, affected + bool(found)
        unknown.update(found)
    if unknown:
        counts = ', '.join(f'{character!r} {count}' for character, count in unknown.most_common())
        logging.warning(
            f"{key}: {affected} of {texts} texts have characters that the model's labels lack: {counts}. They are left out of "
            "the references, so error rates are those of other words."
        )
    return unknown


def characters_known_by(model) -> Callable[[str], bool]:
    """Return whether a recogniser can write a character: one of its labels, or of its tokenizer's pieces."""
    if model.cfg.get('tokenizer') is None:
        return set(model.cfg.labels).__contains__
    tokenizer = model.tokenizer
    return lambda character: character.isspace() or tokenizer.unk_id not in tokenizer.text_to_ids(character)
