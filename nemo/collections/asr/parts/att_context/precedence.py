# SPDX-License-Identifier: Apache-2.0
"""Who wins, when several say what the attention context is. The table for people is in ``docs/contexts.md``."""

from collections.abc import Callable

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.context_sampler import within_ceiling
from nemo.collections.asr.parts.att_context.windows import Window

CEILING = 'encoder.att_context_ceiling'  # as errors name it


def context_of_batch(
    default: AttContext,
    by_hand: AttContext | None = None,
    with_batch: AttContext | None = None,
    draw: Callable[[], AttContext] | None = None,
    ceiling: AttContext | None = None,
    style: str = 'regular',
    cuts_chunks: bool = False,
) -> AttContext:
    """Return the context of a batch, in attention frames. The layers' own contexts narrow it later, one by one.

    Args:
        default: what holds where nobody says anything.
        by_hand: what somebody has set; it wins over all but the ceiling.
        with_batch: what came with the batch.
        draw: draws one; called only where neither of the two above is given. None: nothing is drawn.
        ceiling: what narrows all of them, a curriculum's; None narrows nothing.
        style: the attention style, for the ceiling.
        cuts_chunks: whether a ceiling cuts chunks, as where their size is drawn, and needs no context of the style that
            shows what both show; see ``within_ceiling``.

    Raises:
        ValueError: if the style has no context that shows what both the context and the ceiling show.
    """
    context = by_hand if by_hand is not None else with_batch
    if context is None:
        context = default if draw is None else draw()
    if ceiling is None:
        return context
    if cuts_chunks:
        return within_ceiling(context, ceiling, style)
    return Window(context, style).intersect(ceiling, CEILING).context
