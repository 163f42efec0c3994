# SPDX-License-Identifier: Apache-2.0
"""The characters of transcripts, and those that a recogniser cannot write. New in this project."""

from collections import Counter
from collections.abc import Callable, Iterator

from nemo.collections.asr.data.data_checks import paths_in, sources_in
from nemo.collections.asr.parts.utils.manifest_index import Line, is_remote, read_entries
from nemo.utils import logging


def transcribed(section) -> Iterator[Line]:
    """Yield the entries of a data section, of every manifest of this machine that it names.

    Raises:
        ValueError: naming manifest and line, if an entry has no text.
    """
    for _, source in sources_in(section):
        for path in paths_in(source.get('manifest_filepath')):
            for line in () if is_remote(path) else read_entries(path):
                if not isinstance(line.entry.get('text'), str):
                    raise ValueError(f"{line.manifest}, line {line.number} has no text")
                yield line


def characters_of(section) -> list[str]:
    """Return the characters of all texts of a data section, sorted.

    Raises:
        ValueError: as :func:`transcribed`, or if there are none.
    """
    found = set().union(*(line.entry['text'] for line in transcribed(section)))
    if not found:
        raise ValueError("the manifests have no texts; set model.labels")
    return sorted(found)


def report_unknown_characters(key: str, section, knows: Callable[[str], bool]) -> Counter:
    """Log which characters of a section's texts a recogniser cannot write, and how often each occurs.

    NeMo leaves such characters out of the references, and error rates are then those of other words.
    """
    texts, unknown, affected = 0, Counter(), 0
    known: dict[str, bool] = {}
    for line in transcribed(section):
        found = [character for character in line.entry['text'] if not _is_known(character, knows, known)]
        texts, affected = texts + 1, affected + bool(found)
        unknown.update(found)
    if unknown:
        counts = ', '.join(f'{character!r} {count}' for character, count in unknown.most_common())
        logging.warning(
            f"{key}: {affected} of {texts} texts have characters that the model's labels lack: {counts}. They are left out of "
            "the references, so error rates are those of other words."
        )
    return unknown


def _is_known(character: str, knows: Callable[[str], bool], known: dict[str, bool]) -> bool:
    if character not in known:
        known[character] = knows(character)
    return known[character]


def characters_known_by(model) -> Callable[[str], bool]:
    """Return whether a recogniser can write a character: one of its labels, or of its tokenizer's pieces."""
    if model.cfg.get('tokenizer') is None:
        return set(model.cfg.labels).__contains__
    tokenizer = model.tokenizer
    return lambda character: character.isspace() or tokenizer.unk_id not in tokenizer.text_to_ids(character)
