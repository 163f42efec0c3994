# SPDX-License-Identifier: Apache-2.0
"""Words out of live streams.

::

    transcriber = StreamingTranscriber(model, att_context_size=[70, 0])
    for samples in microphone:                           # [1, n], any n
        (transcript,) = transcriber.step(samples)        # transcript.text, transcript.words
    (transcript,) = transcriber.finish()

Shapes: B streams, N samples.
"""

from collections.abc import Sequence

from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.streaming.text import Transcript


class StreamingTranscriber:
    """A :class:`StreamingSession` of which only the text is wanted.

    Args:
        model: a CTC, RNNT or hybrid model with an encoder that streams; its decoding must be greedy.
        batch_size: B.
        att_context_size: the context; None: the encoder's default.
        fast, weights: as of the session.

    Raises:
        ValueError: as the session does, and if the model has no text.
    """

    def __init__(
        self, model, batch_size: int = 1, att_context_size=None, fast: str = 'auto', weights: str = 'float32'
    ):
        self.session = StreamingSession(
            model, batch_size, att_context_size, fast=fast, return_text=True, weights=weights
        )

    def step(self, samples, lengths=None, ended=None) -> list[Transcript]:
        """Take samples [B, N], and return what each stream has said so far; arguments and errors are the session's."""
        return self.session.step(samples, lengths, ended).transcripts

    def finish(self) -> list[Transcript]:
        """End all streams, and return all that each has said."""
        return self.session.finish().transcripts

    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Begin anew; all streams, or those with these indices."""
        self.session.reset(streams)

    def state_dict(self) -> dict:
        """Return a copy of all state; see the session."""
        return self.session.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on where another transcriber of the same model was."""
        self.session.load_state_dict(state)
