# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``audio_to_text_lhotse.py``: channels are mixed down, and what lhotse skips is counted."""

from nemo.collections.asr.data.ssl_dataset import ChecksCuts
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class LhotseSpeechToTextBpeDataset(ChecksCuts, _up.LhotseSpeechToTextBpeDataset):
    """NeMo's lhotse dataset of recognisers."""
