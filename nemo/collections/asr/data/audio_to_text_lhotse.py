# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``audio_to_text_lhotse.py``: mixes channels down, counts what lhotse skips."""

import torch

from nemo.collections.asr.data.ssl_dataset import SILENCE, ChecksCuts, NothingLeftError
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class SilentBatch(list):
    """Replaces a batch whose utterances are all left out; ``LogLeftOut`` lets it add no gradient."""

    is_silence = True


class LhotseSpeechToTextBpeDataset(ChecksCuts, _up.LhotseSpeechToTextBpeDataset):
    """NeMo's lhotse dataset of recognisers."""

    def __getitem__(self, cuts):
        try:
            return super().__getitem__(cuts)
        except NothingLeftError:
            if self.return_cuts:  # silence has no cut to return
                raise
            tokens = torch.zeros(1, 1, dtype=torch.long)
            return SilentBatch([torch.zeros(1, SILENCE), torch.tensor([SILENCE]), tokens, torch.tensor([1])])
