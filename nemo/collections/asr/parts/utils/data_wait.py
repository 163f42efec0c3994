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
    """Measures, by a clock in seconds of this process, from the end of a step to the start of the next.

    A GPU computes while the process waits, so there the share is an upper bound.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.started = 0.0  # of the last step
        self.ended: float | None = None
        self.recent: deque[tuple[float, float]] = deque(maxlen=STEPS_TO_JUDGE)  # waits, and times from step to step
        self.warned = False

    def step_starts(self) -> float | None:
        """Return the share of the last step's time that was a wait; None if no step came just before."""
        now, started, ended = self.clock(), self.started, self.ended
        self.started, self.ended = now, None
        if ended is None:
            return None
        self.recent.append((now - ended, now - started))
        waited, whole = map(sum, zip(*self.recent))
        if not self.warned and len(self.recent) == STEPS_TO_JUDGE and waited > SHARE_TO_WARN_OF * whole:
            self.warned = True
            logging.warning(
                f"{waited / whole:.0%} of the last {len(self.recent)} steps were spent waiting for data ({NAME}). More "
                "train_ds.num_workers read more at once; shards read faster than single files; see docs/scale.md"
            )
        return (now - ended) / max(now - started, 1e-9)

    def step_ends(self) -> None:
        """Note the end of a step."""
        self.ended = self.clock()

    def pause(self) -> None:
        """Note that something else comes before the next step, as validation."""
        self.ended = None
