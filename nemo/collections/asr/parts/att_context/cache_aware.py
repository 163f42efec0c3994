# SPDX-License-Identifier: Apache-2.0
"""Cache sizes of NeMo's cache-aware streaming for contexts that differ by layer."""

from collections.abc import Sequence

from nemo.collections.asr.parts.att_context.context import UNLIMITED
from nemo.collections.asr.parts.att_context.windows import Window


class CannotStreamError(ValueError):
    """The encoder's contexts do not allow streaming, or not in chunks like these."""


def streaming_look_ahead(batch: Window, layers: Sequence[Window], convolution: int) -> int:
    """Return how many frames after a frame its output depends on, if that is known and the same for all chunks.

    Args:
        batch: the window of the batch's context.
        layers: the window of each layer.
        convolution: frames after a frame that a layer's convolution sees.

    Raises:
        CannotStreamError: if it is not.
    """
    where = f'att_context_size {batch.context.as_list()} cannot be streamed'
    if batch.style == 'chunked_limited':
        if not batch.has_chunks:
            raise CannotStreamError(f"{where}: it has no chunks")
        return batch.context.right
    rights = [window.context.right for window in layers]
    if UNLIMITED in rights:
        raise CannotStreamError(f"{where}: the right context of layer {rights.index(UNLIMITED)} is unlimited")
    return sum(right + convolution for right in rights)


def check_streaming_chunk(batch: Window, chunk_size: int, shift_size: int, look_ahead: int) -> None:
    """Check that a stream can be cut into chunks of this size, in attention frames.

    Args:
        batch: the window of the batch's context.
        chunk_size: frames of a chunk.
        shift_size: frames from one chunk to the next.
        look_ahead: of the encoder, see :func:`streaming_look_ahead`.

    Raises:
        CannotStreamError: if it cannot.
    """
    if batch.style == 'chunked_limited':
        if chunk_size % batch.chunk:
            raise CannotStreamError(
                f"chunk_size is {chunk_size}; with att_context_size {batch.context.as_list()} it must be a multiple "
                f"of {batch.chunk}"
            )
    elif chunk_size - shift_size < look_ahead:
        raise CannotStreamError(
            f"chunk_size {chunk_size} with shift_size {shift_size} leaves a look-ahead of "
            f"{chunk_size - shift_size} frames; the layers' right contexts add up to {look_ahead}"
        )


def largest_left_context(batch: Window, layers: Sequence[Window], unlimited: int) -> int:
    """Return how many frames the largest left context of all layers has, rounded up to whole chunks of the batch's.

    Without a limit it is ``unlimited``. Chunks of the cache and of the input then meet.
    """
    lefts: list[int] = [window.context.left for window in layers]
    longest: int | None = None if UNLIMITED in lefts else max(lefts)
    return -(-(unlimited if longest is None else longest) // batch.chunk) * batch.chunk
