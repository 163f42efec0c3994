# SPDX-License-Identifier: Apache-2.0
"""The share of training that waits for data, by a clock that the test holds."""

import pytest

from nemo.collections.asr.parts.utils.data_wait import STEPS_TO_JUDGE, DataWait


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def steps(wait, clock, number, step, waited):
    shares = []
    for _ in range(number):
        shares.append(wait.step_starts())
        clock.now += step
        wait.step_ends()
        clock.now += waited
    return shares


def test_the_share_is_that_of_the_time_from_step_to_step():
    clock = Clock()
    shares = steps(DataWait(clock), clock, 4, step=3.0, waited=1.0)
    assert shares[0] is None and shares[1:] == pytest.approx([0.25] * 3)


def test_validation_is_no_wait():
    clock = Clock()
    wait = DataWait(clock)
    steps(wait, clock, 2, 3.0, 1.0)
    wait.pause()
    clock.now += 100.0
    assert wait.step_starts() is None
    clock.now += 3.0
    wait.step_ends()
    clock.now += 1.0
    assert wait.step_starts() == pytest.approx(0.25)


@pytest.mark.parametrize('waited, told', [(0.5, False), (1.0, True)])
def test_much_waiting_is_told_once(warnings, waited, told):
    clock = Clock()
    steps(DataWait(clock), clock, 3 * STEPS_TO_JUDGE, 3.0, waited)
    assert len(warnings) == told
    if told:
        assert '25% of the last 50 steps were spent waiting for data (data_wait_share)' in warnings[0]
