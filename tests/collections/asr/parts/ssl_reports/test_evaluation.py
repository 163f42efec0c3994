# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
import math

import numpy as np
import pytest
import torch
from tiny_nest import batches, noise_batch, tiny_model, trainer

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.ssl_reports.evaluation import (
    UtteranceScores,
    evaluate,
    loss_difference,
    ratio_of_sums,
    summarize,
)
from nemo.collections.asr.parts.ssl_reports.validation import FrameScores

SECONDS = (3.0, 2.0, 1.2)


def scores_of(*utterances):
    """Scores with these negative log-likelihoods of the frames of each utterance; every second frame is correct."""
    scores = UtteranceScores()
    for values in utterances:
        likelihood = torch.tensor(values)
        correct = torch.arange(len(values)).remainder(2).float()
        scores.add([FrameScores(likelihood, correct, torch.zeros(len(values), dtype=torch.long))], 1)
    return scores


@pytest.mark.unit
def test_sums_of_utterances_over_draws():
    scores = UtteranceScores()
    first = FrameScores(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 2]))
    second = FrameScores(torch.tensor([8.0]), torch.tensor([0.0]), torch.tensor([2]))
    scores.add([first, second], utterances=3)
    scores.add([first], utterances=3)
    assert scores.columns().tolist() == [[3, 0, 12, 3, 0, 4], [1, 0, 1, 1, 0, 1], [2, 0, 2, 2, 0, 1]]


@pytest.mark.unit
def test_estimates():
    found = summarize(scores_of([1.0, 3.0], [2.0, 2.0, 2.0, 6.0]), resamples=50, confidence=0.9, seed=0)
    assert found['loss'].value == pytest.approx(16 / 6) and found['accuracy'].value == 0.5
    assert (found['loss'].low, found['loss'].high) == (2, 3)  # both utterances are the first one, or the second
    assert found['perplexity'].value == pytest.approx(math.exp(16 / 6)) and found['perplexity'].high == math.exp(3)
    again = summarize(scores_of([1.0, 3.0], [2.0, 2.0, 2.0, 6.0]), resamples=50, confidence=0.9, seed=0)
    assert found == again
    single = summarize(scores_of([1.0, 3.0]), resamples=50, confidence=0.9, seed=0)['loss']
    assert single.value == 2 and math.isnan(single.low) and math.isnan(single.high)


@pytest.mark.unit
def test_intervals_hold_the_true_value_about_as_often_as_they_say():
    generator, inside = np.random.default_rng(0), 0
    for trial in range(100):
        frames = generator.integers(5, 30, size=40)
        means = generator.normal(2.0, 0.5, size=40)  # frames of an utterance are alike
        estimate = ratio_of_sums(means * frames, frames.astype(float), 200, 0.9, seed=trial)
        inside += estimate.low <= 2.0 <= estimate.high
    assert 80 <= inside <= 97


@pytest.mark.unit
def test_differences_are_paired():
    one, other = scores_of([1.0, 3.0], [5.0, 5.0]), scores_of([1.5, 3.5], [5.5, 5.5])
    difference = loss_difference(other, one, resamples=20, confidence=0.9, seed=0)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))
    assert loss_difference(scores_of([1.0], [5.0, 5.0]), one, 20, 0.9, 0) is None


@pytest.mark.integration
def test_it_agrees_with_validation_and_with_any_cut_into_batches():
    model, contexts = tiny_model(), [[10, 0], [40, 0]]
    found = evaluate(model, batches(2, SECONDS), contexts, seed=0, window=Window(AttContext(10, 0)))
    run = trainer(1)
    model.set_trainer(run)
    reported = run.validate(model, dataloaders=batches(2, SECONDS), verbose=False)[0]
    for label in ('10_0', '40_0'):
        likelihood, correct, frames = found.contexts[label].columns().sum(axis=1)
        assert likelihood / frames == pytest.approx(reported[f'val_loss/ctx_{label}'], rel=1e-5)
        assert correct / frames == pytest.approx(reported[f'val_accuracy/ctx_{label}'], rel=1e-5)
    assert found.contexts['10_0'].columns().shape == (3, 6) and 0 < found.commonest < 1
    assert found.codebook['classes'] == 32 and 1 < found.codebook['codes_used'] <= 32

    twice = (
        evaluate(model, [noise_batch(SECONDS)], contexts, seed=0, window=Window(AttContext(10, 0)), draws=2)
        .contexts['10_0']
        .columns()
    )
    window = Window(AttContext(10, 0))
    once = [
        evaluate(model, [noise_batch(SECONDS)], contexts, seed, window).contexts['10_0'].columns() for seed in (0, 1)
    ]
    np.testing.assert_allclose(twice, once[0] + once[1], rtol=1e-5)
