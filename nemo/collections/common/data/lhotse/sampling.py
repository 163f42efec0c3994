# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``sampling.py``: what the limits on the duration leave out is counted."""

from nemo.utils.left_out import LEFT_OUT, OUTSIDE_LIMITS
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class DurationFilter(_up.DurationFilter):
    """NeMo's filter, which counts each cut once in a process, however often it comes."""

    counted: set[tuple] = set()  # of the class: samplers are copied

    def __call__(self, example) -> bool:
        """Return whether to keep a cut, or a conversation of cuts."""
        if super().__call__(example):
            return True
        key = (example.id, str(getattr(example, 'custom', None)), self.d_min, self.d_max)  # segments may share an id
        if key not in self.counted:
            self.counted.add(key)
            LEFT_OUT.add(OUTSIDE_LIMITS, f"{example.id}: {getattr(example, 'duration', '?')} s")
        return False
