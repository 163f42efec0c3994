# SPDX-License-Identifier: Apache-2.0
"""Live streams through a model, equal to its offline forward. NeMo has no such package."""

from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession
from nemo.collections.asr.parts.streaming.text import TextOptions, Transcript, Word

__all__ = ['StreamingOutput', 'StreamingSession', 'TextOptions', 'Transcript', 'Word']
