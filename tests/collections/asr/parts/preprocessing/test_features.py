# SPDX-License-Identifier: Apache-2.0
import importlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import nemo.collections.asr.parts.preprocessing.features as patched
from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor
from nemo.collections.asr.parts.preprocessing.features import (
    load_fixed_statistics,
    normalize_batch,
    standardize_per_feature,
)

stock_normalize_batch = patched._stock_normalize_batch
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def features(batch, dimension, frames, dtype=torch.float32, seed=0):
    return (torch.randn(batch, dimension, frames, generator=torch.Generator().manual_seed(seed)) * 3 - 11).to(dtype)


def fixed(mean, std):
    return {"fixed_mean": mean, "fixed_std": std}


def preprocessor(normalize, **settings):
    settings = {"features": 80, "n_fft": 512, "window_size": 0.025, "pad_to": 0, "dither": 0.0, **settings}
    return AudioToMelSpectrogramPreprocessor(normalize=normalize, **settings).eval()


def test_fixed_statistics_by_eye_in_a_batch_of_two_for_which_stock_fails():
    x, statistics = (
        torch.tensor([[[1.0, 3.0], [2.0, 10.0]], [[5.0, -1.0], [6.0, -2.0]]]),
        fixed([1.0, 2.0], [2.0, 4.0]),
    )
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        stock_normalize_batch(x, torch.tensor([2, 2]), statistics)
    normalised, mean, std = normalize_batch(x, torch.tensor([2, 2]), statistics)
    assert normalised.tolist() == [[[0, 1], [0, 2]], [[2, -1], [1, -1]]]
    assert (mean.tolist(), std.tolist()) == ([1, 2], [2, 4])


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor, OmegaConf.create])
def test_fixed_statistics_equal_stock_for_one_utterance(convert):
    mean, std = [-10.3, -11.2, -12.1], [2.7, 3.1, 0.4]
    x, lengths = features(1, 3, 50), torch.tensor([50])
    expected = stock_normalize_batch(x, lengths, fixed(mean, std))
    found = normalize_batch(x, lengths, fixed(convert(mean), convert(std)))
    for ours, stocks in zip(found, expected):
        torch.testing.assert_close(ours, stocks, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fixed_statistics_keep_dtype_and_device(dtype, device):
    x = features(3, 2, 5, dtype).to(device)
    normalised = normalize_batch(x, torch.tensor([5, 4, 1], device=device), fixed([-11.0, -11.0], [3.0, 3.0]))[0]
    assert (normalised.dtype, normalised.device, normalised.shape) == (dtype, x.device, x.shape)


def test_low_precision_does_not_round_the_statistics():
    x = features(2, 1, 100, torch.bfloat16)
    expected = (x.double() + 11.2345) / 3.0123
    error = (normalize_batch(x, None, fixed([-11.2345], [3.0123]))[0].double() - expected).abs()
    assert error.max() <= 2**-8 * expected.abs().max()  # that of rounding the result itself


def test_statistics_are_made_once_and_can_be_trained_through():
    statistics = fixed([0.25, 0.5], [2.0, 7.0])
    with torch.inference_mode():
        first = normalize_batch(features(1, 2, 3), None, statistics)
    x = features(2, 2, 3).requires_grad_()
    normalised, mean, _ = normalize_batch(x, None, statistics)
    normalised.square().sum().backward()
    assert mean is first[1] and x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "statistics, message",
    [
        ({"fixed_mean": [1.0, 2.0]}, r"preprocessor\.normalize has no fixed_std; it needs both"),
        (fixed([1.0], [1.0]), r"preprocessor\.normalize\.fixed_mean has 1 numbers; it needs 2, one per feature"),
        (fixed([1.0, 2.0], [1.0, 0.0]), r"fixed_std\[1\] is 0.0; every value must be finite and above 0"),
        (fixed([float("nan"), 2.0], [1.0, 1.0]), r"fixed_mean\[0\] is nan; every value must be finite"),
        (fixed("low", [1.0, 1.0]), "fixed_mean is 'low'; it needs a list of numbers"),
        (fixed(3.0, [1.0, 1.0]), "fixed_mean has 1 numbers; it needs 2"),
    ],
)
def test_refuses_statistics(statistics, message):
    for kind in (statistics, OmegaConf.create(statistics)):
        with pytest.raises(ValueError, match=message):
            normalize_batch(features(2, 2, 3), torch.tensor([3, 3]), kind)


def test_a_file_of_statistics_is_not_taken_for_no_normalisation():
    with pytest.raises(ValueError, match="preprocessor.normalize is 'stats.yaml'.*load_fixed_statistics"):
        preprocessor('stats.yaml')


@pytest.mark.parametrize(
    'normalize, warned', [('per_feautre', True), ('per_feature', False), ('NA', False), (None, False)]
)
def test_a_word_that_nemo_does_not_know_is_a_warning(normalize, warned, warnings):
    preprocessor(normalize)
    assert any(f'{normalize!r}, which NeMo takes for no' in message for message in warnings) == warned


def test_a_reload_finds_stocks_function():
    before, stocks = dict(vars(patched)), dict(vars(patched._up))
    try:
        importlib.reload(patched)  # as notebooks do
        assert patched.normalize_batch(features(1, 4, 20), torch.tensor([20]), "per_feature")[0].shape == (1, 4, 20)
    finally:
        vars(patched).update(before)
        vars(patched._up).update(stocks)


@pytest.mark.parametrize("kind", ["per_feature", "all_features", "NA"])
def test_strings_get_stocks_result(kind):
    x, lengths = features(3, 4, 20), torch.tensor([20, 11, 7])
    for ours, stocks in zip(normalize_batch(x, lengths, kind), stock_normalize_batch(x, lengths, kind)):
        assert ours is stocks or torch.equal(ours, stocks)


@pytest.mark.run_only_on("GPU")
def test_no_sync_on_the_gpu():
    x, lengths = features(4, 2, 30).cuda(), torch.tensor([30, 20, 1, 0]).cuda()
    statistics = fixed([1.0, 2.0], [2.0, 4.0])
    normalize_batch(x, lengths, statistics)  # the first call copies the statistics
    torch.cuda.set_sync_debug_mode("error")
    try:
        normalize_batch(x, lengths, statistics)
        standardize_per_feature(x, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_ragged_batch_equals_single_utterances():
    statistics = OmegaConf.create(fixed([-11.0 + k / 80 for k in range(80)], [3.0 + k / 80 for k in range(80)]))
    module, plain = preprocessor(statistics), preprocessor("NA")
    signal, lengths = torch.randn(3, 16000), torch.tensor([16000, 8000, 321])
    batch, frames = module(input_signal=signal, length=lengths)
    assert frames.tolist() == [100, 50, 2]
    for index, (samples, count) in enumerate(zip(lengths, frames)):
        single, _ = module(input_signal=signal[index : index + 1, :samples], length=samples[None])
        torch.testing.assert_close(batch[index, :, :count], single[0, :, :count], rtol=0, atol=1e-5)
        assert batch[index, :, count:].abs().sum() == 0
    raw, _ = plain(input_signal=signal, length=lengths)
    expected = (raw[0, 7, 0] + 11.0 - 7 / 80) / (3.0 + 7 / 80)
    assert batch[0, 7, 0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_wrong_statistics_fail_when_the_model_is_made():
    with pytest.raises(ValueError, match=r"preprocessor\.normalize\.fixed_mean has 64 numbers; it needs 80"):
        preprocessor(fixed([0.0] * 64, [1.0] * 64))
    assert preprocessor(fixed([0.0] * 160, [1.0] * 160), frame_splicing=2).featurizer.frame_splicing == 2


def test_standardize_by_eye():
    found = standardize_per_feature(torch.tensor([[[1.0, 2.0, 3.0, 100.0]]]), torch.tensor([3]))
    torch.testing.assert_close(found, torch.tensor([[[-1.0, 0.0, 1.0, 0.0]]]), rtol=0, atol=2e-5)
    assert standardize_per_feature(torch.full((1, 2, 8), -16.6), torch.tensor([8])).abs().max() < 0.5


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=5),
    dimension=st.integers(1, 8),
    extra=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_standardize_equals_stock_on_valid_frames(lengths, dimension, extra, seed):
    frames = max(lengths) + extra
    x, count = features(len(lengths), dimension, frames, seed=seed), torch.tensor(lengths)
    found, expected = standardize_per_feature(x, count), stock_normalize_batch(x, count, "per_feature")[0]
    valid = (torch.arange(frames) < count[:, None])[:, None].expand_as(x)
    torch.testing.assert_close(found[valid], expected[valid], rtol=0, atol=1e-6)
    assert found[~valid].abs().sum() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_standardize_keeps_dtype_and_is_finite_for_short_utterances(dtype):
    x = features(3, 4, 6, dtype)
    x[:, :, 5] = float("nan")  # padding must not leak into the statistics
    found = standardize_per_feature(x, torch.tensor([5, 1, 0]))
    assert found.dtype == dtype and found.isfinite().all() and found[1:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_standardize_uses_float32_statistics_in_half_precision(dtype):
    x = features(2, 3, 3000, dtype)  # a sum of 3000 x -11 in half precision would be off by whole units
    expected = standardize_per_feature(x.double(), torch.tensor([3000, 2500]))
    found = standardize_per_feature(x, torch.tensor([3000, 2500]))
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-3)


def test_standardize_on_the_meta_device_and_compiled():
    assert standardize_per_feature(torch.empty(2, 3, 4, device="meta"), torch.empty(2, device="meta")).shape == (
        2,
        3,
        4,
    )
    compiled = torch.compile(standardize_per_feature, fullgraph=True, backend="eager")
    x, lengths = features(2, 3, 7), torch.tensor([7, 3])
    assert torch.equal(compiled(x, lengths), standardize_per_feature(x, lengths))


def test_a_file_of_statistics_is_what_the_preprocessor_takes(tmp_path):
    path = tmp_path / "stats.yaml"
    path.write_text("# a comment\nfixed_mean: [-1.5, 2]\nfixed_std: [0.5, 1e-3]\n")
    assert load_fixed_statistics(path) == fixed([-1.5, 2.0], [0.5, 0.001])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("fixed_mean: [1.0\n", "cannot be read"),
        ("fixed_mean: [1.0, 2.0]\nfixed_std: [1.0]\n", r"fixed_std has 1 numbers; it needs 2"),
    ],
)
def test_errors_name_the_file_of_statistics(tmp_path, content, message):
    path = tmp_path / "stats.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_fixed_statistics(path)
    assert str(path) in str(raised.value)
