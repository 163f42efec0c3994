# SPDX-License-Identifier: Apache-2.0
"""Lazy manifests: utterances are parsed on access. Takes the place of ``ASRAudioText``.

NeMo makes a Python object of each entry, and looks for its file: a million take 45 s, and a copy in each worker.
"""

from collections.abc import Sequence
from os.path import expanduser

import numpy as np

from nemo.collections.asr.parts.utils.manifest_index import index_of, paths_in
from nemo.collections.common.parts.preprocessing import collections
from nemo.utils import logging
from nemo.utils.data_utils import DataStoreObject
from nemo.utils.left_out import LEFT_OUT, OUTSIDE_LIMITS

collections.AudioTextEntity = collections.AudioText.OUTPUT_TYPE  # pickle looks it up there, for spawned workers


class ManifestEntries(Sequence):
    """What NeMo's collections give, without text: arguments and items are those of ``ASRAudioText``.

    Utterances without a duration, in seconds, stay. ValueError names file and line, if a line is no entry.
    """

    def __init__(self, manifests_files, parse_func, min_duration=None, max_duration=None, max_number=None, **unused):
        self.parse, self.manifests = parse_func, [expanduser(path) for path in paths_in(manifests_files)]
        self.indices = [index_of(DataStoreObject(manifest).get()) for manifest in self.manifests]
        durations = np.concatenate([index.durations for index in self.indices])
        keep = np.concatenate([index.lasting(min_duration, max_duration) for index in self.indices])
        self.kept = np.flatnonzero(keep)[: max_number or None]
        self.first_of = np.cumsum([0, *map(len, self.indices)])  # number of the first entry of each manifest
        hours = np.nansum(durations[self.kept]) / 3600
        logging.info("Dataset loaded with %d files totalling %.2f hours", len(self), hours)
        if not keep.all():
            manifest, place = self._place_of(int(keep.argmin()))
            entry = f'entry {place + 1} of {self.manifests[manifest]}: {durations[keep.argmin()]} s'
            LEFT_OUT.add(OUTSIDE_LIMITS, entry, int((~keep).sum()))

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index):
        number = int(self.kept[index])
        manifest, place = self._place_of(number)
        item = self.parse(self.indices[manifest].line(place), self.manifests[manifest])
        tokens, text = item.pop('token_labels', None), item.pop('text')
        return collections.AudioText.OUTPUT_TYPE(id=number, text_tokens=tokens or [], text_raw=text, **item)

    def _place_of(self, number: int) -> tuple[int, int]:
        """Return the manifest of an entry, and the number of the entry in it."""
        manifest = int(np.searchsorted(self.first_of, number, side='right')) - 1
        return manifest, number - int(self.first_of[manifest])
