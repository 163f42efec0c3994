# SPDX-License-Identifier: Apache-2.0
"""Where a run would make the host wait for the device, or copy between the two: noted with the function that asks."""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

NEMO_FILE = re.compile(r'.*/(nemo/(?:collections|core|utils)/.*\.py)$')
OTHER_FILE = re.compile(r'.*/(?:site-packages|tests)/(.*\.py)$')
HARNESS = ('fake_device.py', 'gpu_rules.py', 'host_traffic.py')
BACKWARD = ('', 'backward pass')
PLUMBING = ('torch/_', 'torch/utils/', 'torch/nn/modules/module.py', 'torch/functional.py')


class Meeting(NamedTuple):
    """One kind of traffic between host and device, by the function that asks for it.

    The kind is ``wait``, ``copy to host`` (which waits, too) or ``copy to device``; the file is NeMo's, patched or
    stock, or else that of the library or the test.
    """

    kind: str
    operation: str
    file: str
    function: str


_recorded: Counter | None = None


@contextmanager
def recorded(into: Counter | None = None) -> Iterator[Counter]:
    """Record within; yields the count of each :class:`Meeting`, added to those of ``into`` if it is given."""
    global _recorded
    before, _recorded = _recorded, Counter() if into is None else into
    try:
        yield _recorded
    finally:
        _recorded = before


@contextmanager
def unrecorded() -> Iterator[Counter]:
    """Do not record within: what the test itself makes or reads. Yields what to go on with, for :func:`recorded`."""
    global _recorded
    before, _recorded = _recorded, None
    try:
        yield Counter() if before is None else before
    finally:
        _recorded = before


def note(kind: str, operation: str) -> None:
    """Record that the host waits or copies now, and who asks for it."""
    if _recorded is not None:
        _recorded[Meeting(kind, operation, *_who_asks())] += 1


def _who_asks() -> tuple[str, str]:
    """Return file and function of the innermost frame of NeMo; without one, of what is not plumbing of torch."""
    frame, other = sys._getframe(2), None
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        nemo = NEMO_FILE.match(file)
        if nemo and not function.startswith('<'):  # a comprehension is no function since Python 3.12
            return nemo[1], function
        found = OTHER_FILE.match(file)
        if other is None and found and found[1].startswith('torch/autograd/'):
            return BACKWARD
        if other is None and found and not found[1].endswith(HARNESS) and not found[1].startswith(PLUMBING):
            other = found[1], function
        frame = frame.f_back
    return other or BACKWARD  # which has a thread of its own
