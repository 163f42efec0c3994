# SPDX-License-Identifier: Apache-2.0
"""The share of training time that is spent waiting for data."""

import time
from collections import deque
from collections.abc import Callable

from nemo.utils import logging

NAME = 'data_wait_share'
SHARE_TO_WARN_OF = 0.2
STEPS_TO_JUDGE = 50


class DataWait:
    """Measures, by the clock of this process, from the end of a step to the start of the next.

    On a GPU the process runs ahead of the device, so the share is an upper bound.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.started: float | None = None
        self.ended: float | None = None
        self.recent: deque = deque(maxlen=STEPS_TO_JUDGE)
        self.warned = False

    def step_starts(self) -> float | None:
        """Note the start of a step.

        Returns:
            the share of the time since the last step began that was spent waiting; None for the first step, and after
            something else, as validation.
        """
        now, share = self.clock(), None
        if self.started is not None and self.ended is not None:
            share = (now - self.ended) / max(now - self.started, 1e-9)
            self.recent.append((now - self.ended, now - self.started))
            self._warn()
        self.started, self.ended = now, None
        return share

    def step_ends(self) -> None:
        """Note the end of a step."""
        self.ended = self.clock()

    def pause(self) -> None:
        """Note that something else comes before the next step."""
        self.ended = None

    def _warn(self) -> None:
        waited, whole = (sum(part) for part in zip(*self.recent))
        if self.warned or len(self.recent) < STEPS_TO_JUDGE or waited <= SHARE_TO_WARN_OF * whole:
            return
        self.warned = True
        logging.warning(
            f"{waited / whole:.0%} of the last {len(self.recent)} steps were spent waiting for data ({NAME}). More "
            "train_ds.num_workers read more at once; shards read faster than single files; see docs/scale.md"
        )
