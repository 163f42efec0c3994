# SPDX-License-Identifier: Apache-2.0
"""Lazy manifests: utterances are parsed on access. Takes the place of ``ASRAudioText``.

NeMo makes a Python object of each entry before the first step, and looks for its audio file on the disk: a million take 45 s
and more, and each worker's copy of them grows as it counts references.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os.path import expanduser

import numpy as np

from nemo.collections.asr.data import audio_to_text
from nemo.collections.asr.parts.utils.manifest_index import index_of
from nemo.collections.common.parts.preprocessing import collections
from nemo.utils import logging
from nemo.utils.data_utils import DataStoreObject
from nemo.utils.left_out import LEFT_OUT

collections.AudioTextEntity = collections.AudioText.OUTPUT_TYPE  # pickle looks it up there, for spawned workers
OUTSIDE_LIMITS = 'outside of min_duration and max_duration'


class ManifestEntries(Sequence):
    """What NeMo's collections give, without text: an utterance's item is that of ``ASRAudioText``.

    Args:
        manifests: paths; those in a data store are fetched as NeMo does.
        parse: makes a dict of a line and its manifest's name.
        min_duration: shorter utterances are left out, in seconds.
        max_duration: the same for longer ones; those without a duration stay.
        max_number: how many are taken at most; 0 or None: all.

    Raises:
        ValueError: naming file and line, if there is a line that is no JSON object or has a duration that is not a number.
    """

    def __init__(
        self,
        manifests: str | list[str],
        parse: Callable[[str, str], dict],
        min_duration: float | None = None,
        max_duration: float | None = None,
        max_number: int | None = None,
    ):
        self.parse = parse
        self.manifests = [expanduser(path) for path in ([manifests] if isinstance(manifests, str) else manifests)]
        self.indices = [index_of(DataStoreObject(manifest).get()) for manifest in self.manifests]
        durations = np.concatenate([index.durations for index in self.indices])
        keep = np.concatenate([index.lasting(min_duration, max_duration) for index in self.indices])
        self.kept = np.flatnonzero(keep)[: max_number or None]
        self.first_of = np.cumsum([0, *map(len, self.indices)])  # number of the first entry of each manifest
        self._latest: tuple = (None, None)
        self._log(durations, keep)

    def _log(self, durations: np.ndarray, keep: np.ndarray) -> None:
        """Log what NeMo logs, and count what the limits on the duration leave out."""
        if not keep.all():
            number = int(np.flatnonzero(~keep)[0])
            manifest, place = self._place_of(number)
            entry = f'entry {place + 1} of {self.manifests[manifest]}: {durations[number]} s'
            LEFT_OUT.add(OUTSIDE_LIMITS, entry, int((~keep).sum()))
        hours = np.nansum(durations[self.kept]) / 3600
        logging.info("Dataset loaded with %d files totalling %.2f hours", len(self), hours)
        logging.info("%d files were filtered totalling %.2f hours", (~keep).sum(), np.nansum(durations[~keep]) / 3600)
        if np.isnan(durations[self.kept]).any():
            logging.info("Not all audios have duration information, the total number of hours is inaccurate.")

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if self._latest[0] != index:  # a dataset asks twice for the same
            self._latest = index, self._item(index)
        return self._latest[1]

    def _place_of(self, number: int) -> tuple[int, int]:
        """Return the manifest of an entry, and the number of the entry in it."""
        manifest = int(np.searchsorted(self.first_of, number, side='right')) - 1
        return manifest, number - int(self.first_of[manifest])

    def _item(self, index):
        number = int(self.kept[index])
        manifest, place = self._place_of(number)
        item = self.parse(self.indices[manifest].line(place), self.manifests[manifest])
        labels = item.get('token_labels')
        return collections.ASRAudioText.OUTPUT_TYPE(
            id=number,
            audio_file=item['audio_file'],
            duration=item['duration'],
            text_tokens=[] if labels is None else labels,
            offset=item['offset'],
            text_raw=item['text'],
            speaker=item['speaker'],
            orig_sr=item['orig_sr'],
            lang=item['lang'],
        )


class UtteranceManifestProcessor(audio_to_text.ASRManifestProcessor):
    """NeMo's manifest processor on :class:`ManifestEntries`; arguments as there."""

    def __init__(  # noqa: NeMo's reads all entries
        self,
        manifest_filepath,
        parser,
        max_duration=None,
        min_duration=None,
        max_utts=0,
        bos_id=None,
        eos_id=None,
        pad_id=0,
        index_by_file_id=False,
        manifest_parse_func=None,
    ):
        if index_by_file_id or manifest_parse_func is None:
            raise ValueError("UtteranceManifestProcessor needs manifest_parse_func, and does not index_by_file_id")
        self.parser, self.bos_id, self.eos_id, self.pad_id = parser, bos_id, eos_id, pad_id
        self.collection = ManifestEntries(manifest_filepath, manifest_parse_func, min_duration, max_duration, max_utts)


@contextmanager
def entries_read_when_asked_for() -> Iterator[None]:
    """Let NeMo's datasets that are made in the block have :class:`UtteranceManifestProcessor`."""
    before = audio_to_text.ASRManifestProcessor
    audio_to_text.ASRManifestProcessor = UtteranceManifestProcessor
    try:
        yield
    finally:
        audio_to_text.ASRManifestProcessor = before
