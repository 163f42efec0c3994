# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Where live streaming was in version 0.1; see ``nemo.collections.asr.parts.streaming``."""

from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession  # noqa: F401
