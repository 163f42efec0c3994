# SPDX-License-Identifier: Apache-2.0
"""Where live streaming was in version 0.1; see ``nemo.collections.asr.parts.streaming``."""

from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession  # noqa: F401
