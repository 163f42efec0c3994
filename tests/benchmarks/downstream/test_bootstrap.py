# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import scipy.stats


@pytest.fixture(scope='module')
def bootstrap(load):
    return load('bootstrap')


def utterances(seeds, number, seed=0):
    """Errors [S, U] of about a third of the phones [U]."""
    generator = np.random.default_rng(seed)
    phones = generator.integers(20, 90, number)
    return generator.binomial(phones, 0.3, (seeds, number)), phones


def width(estimate):
    return estimate.high - estimate.low


def test_rates_by_hand(bootstrap):
    errors, phones = np.array([[1, 0, 5], [3, 0, 1]]), np.array([10, 5, 5])
    found = bootstrap.estimate(errors, phones)
    assert found.value == bootstrap.error_rate(errors, phones) == 0.25 and found.low < 0.25 < found.high


@pytest.mark.parametrize('paired', [False, True])
def test_with_one_seed_the_interval_is_scipys(bootstrap, paired):
    errors, phones = utterances(1, 150)
    if paired:
        errors = errors - utterances(1, 150, seed=1)[0]
    found = bootstrap.estimate(errors, phones, resamples=20000)
    expected = scipy.stats.bootstrap(
        (errors[0], phones),
        lambda wrong, said, axis=-1: wrong.sum(axis=axis) / said.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20000,
        method='percentile',
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert [found.low, found.high] == pytest.approx(list(expected), abs=0.03 * width(expected))


def test_errors_that_both_make_do_not_count_in_a_difference(bootstrap):
    errors, phones = utterances(3, 100)
    better = errors - 2  # in every utterance and seed
    difference = bootstrap.estimate(better - errors, phones)
    assert difference.sign == -1 and width(difference) < 0.01
    assert bootstrap.estimate(errors - errors, phones) == (0, 0, 0)
    assert bootstrap.Estimate(0.1, -0.1, 0.2).sign == 0 and bootstrap.Estimate(0.1, 0.05, 0.2).sign == 1


def test_speakers_whose_utterances_are_alike_widen_the_interval(bootstrap):
    phones, speakers = np.full(40, 50), np.repeat(np.arange(4), 10)
    errors = 5.0 + 5 * speakers[None]
    by_utterance, by_speaker = bootstrap.estimate(errors, phones), bootstrap.estimate(errors, phones, speakers)
    assert by_speaker.value == by_utterance.value and width(by_speaker) > 2 * width(by_utterance)
