# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``audio_to_text.py``: an error in audio of a tar file names its member."""

from nemo_streaming_ssl import upstream

_up = upstream(globals())
_build_sample = _up._TarredAudioToTextDataset._build_sample


def _build_named_sample(self, tup):
    try:
        return _build_sample(self, tup)
    except Exception as error:  # of any decoder, which reads bytes
        raise ValueError(f'bad audio: the member {tup[1]} of a tar file: {error}') from error


_up._TarredAudioToTextDataset._build_sample = _build_named_sample  # its subclasses are stock's
