# SPDX-License-Identifier: Apache-2.0
"""The share of training that waits for data, by a clock that the test holds."""

import pytest

from nemo.collections.asr.parts.utils.data_wait import STEPS_TO_JUDGE, DataWait


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def steps(wait, number, step, waited):
    shares = []
    for _ in range(number):
        shares.append(wait.step_starts())
        wait.clock.now += step
        wait.step_ends()
        wait.clock.now += waited
    return shares


def test_the_share_is_that_of_the_time_from_step_to_step_and_validation_is_no_wait():
    wait = DataWait(Clock())
    assert steps(wait, 4, step=3.0, waited=1.0) == [None, *[pytest.approx(0.25)] * 3]
    wait.pause()
    wait.clock.now += 100.0
    assert steps(wait, 2, step=3.0, waited=1.0) == [None, pytest.approx(0.25)]


@pytest.mark.parametrize('waited, told', [(0.5, False), (1.0, True)])
def test_much_waiting_is_told_once(warnings, waited, told):
    steps(DataWait(Clock()), 3 * STEPS_TO_JUDGE, 3.0, waited)
    assert len(warnings) == told
    assert not told or '25% of the last 50 steps were spent waiting for data (data_wait_share)' in warnings[0]
