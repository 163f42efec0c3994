# SPDX-License-Identifier: Apache-2.0
"""What lhotse's limits on the duration leave out is counted, once for each cut."""

import copy

from lhotse.testing.dummies import dummy_cut

from nemo.collections.common.data.lhotse import dataloader
from nemo.utils.left_out import OUTSIDE_LIMITS


def test_cuts_outside_the_limits_are_counted_once(left_out, monkeypatch):
    monkeypatch.setattr(dataloader.DurationFilter, 'counted', set())
    keep = dataloader.DurationFilter(0.5, 2.0)
    cuts = [dummy_cut(number, duration=duration) for number, duration in enumerate((0.1, 1.0, 3.0))]
    for each in (keep, copy.deepcopy(keep)):
        assert [each(cut) for cut in cuts] == [False, True, False]
    assert left_out.reasons() == {OUTSIDE_LIMITS: (2, f'{cuts[0].id}: 0.1 s')}
    assert keep('text') is True
