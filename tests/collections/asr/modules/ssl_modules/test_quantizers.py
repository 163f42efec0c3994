# SPDX-License-Identifier: Apache-2.0
"""Tokens and codes of the quantizer: NeMo's, from matrix products in bounded memory; and projections from a file."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_sizes import LargestTensor

from nemo.collections.asr.modules.ssl_modules import quantizers
from nemo.collections.asr.modules.ssl_modules.quantizers import RandomProjectionVectorQuantizer
from nemo.utils import AppState

StockQuantizer = quantizers._up.RandomProjectionVectorQuantizer


def build_pair(dtype=None, **changed):
    """A patched quantizer and NeMo's own with its weights."""
    arguments = dict(feat_in=6, code_dim=4, num_classes=50, num_books=1, dist_fn='l2', combine_time_steps=1)
    arguments.update(changed)
    patched, stock = RandomProjectionVectorQuantizer(**arguments), StockQuantizer(**arguments)
    stock.load_state_dict(patched.state_dict())
    return (patched, stock) if dtype is None else (patched.to(dtype), stock.to(dtype))


def assert_same(patched, stock, features):
    codes, tokens = patched(input_signal=features)
    stock_codes, stock_tokens = stock(input_signal=features)
    assert tokens.dtype == stock_tokens.dtype and codes.dtype == stock_codes.dtype
    assert torch.equal(tokens, stock_tokens)
    assert torch.equal(codes, stock_codes)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    targets=st.integers(1, 20),
    combine=st.sampled_from([1, 2, 8]),
    books=st.integers(1, 3),
    time_ahead=st.booleans(),
    squeeze=st.booleans(),
    classes=st.sampled_from([1, 2, 50, 300]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_tokens_and_codes_are_nemos(seed, batch, targets, combine, books, time_ahead, squeeze, classes, scale):
    torch.manual_seed(seed)
    arguments = dict(combine_time_steps=combine, num_books=books, num_classes=classes)
    patched, stock = build_pair(time_ahead=time_ahead, squeeze_single=squeeze, **arguments)
    features = torch.randn(batch, 6, targets * combine) * scale
    features[0, :, : combine * 2] = 0  # silence, as padding and digital zeros give it
    assert_same(patched, stock, features.transpose(1, 2).contiguous() if time_ahead else features)


@pytest.mark.parametrize('classes, width', [(8192, 16), (512, 8), (64, 16)])
def test_silence_has_nemos_token(classes, width):
    for seed in range(3):
        torch.manual_seed(seed)
        assert_same(*build_pair(num_classes=classes, code_dim=width), torch.zeros(1, 6, 20))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('dist_fn', ['l2', 'cosine'])
def test_both_distances_in_both_dtypes(dist_fn, dtype):
    torch.manual_seed(1)
    patched, stock = build_pair(dtype, dist_fn=dist_fn, num_books=2)
    features = torch.randn(2, 6, 200, dtype=dtype)
    # Codes that are equally near but for rounding may change places: in float32 NeMo's own rounding decides.
    if dtype == torch.float64:
        assert_same(patched, stock, features)
    same = patched(input_signal=features)[1] == stock(input_signal=features)[1]
    assert same.float().mean() > 0.99


@pytest.mark.parametrize('frames, combine, targets', [(17, 8, 2), (7, 8, 0), (8, 8, 1), (0, 1, 0)])
def test_a_remainder_of_frames_gives_no_token(frames, combine, targets):
    patched, _ = build_pair(combine_time_steps=combine)
    features = torch.randn(2, 6, frames)
    codes, tokens = patched(input_signal=features)
    assert tokens.shape == (2, targets, 1) and codes.shape == (2, 4, targets, 1)
    if targets:
        assert torch.equal(tokens, patched(input_signal=features[..., : targets * combine])[1])


@pytest.mark.parametrize('at_a_time', [1, 50, 120, 10**6])
def test_how_many_scores_are_held_at_a_time_changes_nothing(at_a_time):
    torch.manual_seed(2)
    patched, stock = build_pair(num_books=2)
    features = torch.randn(3, 6, 31)
    with mock.patch.object(quantizers, 'SCORES_AT_A_TIME_ON_CPU', at_a_time):
        assert_same(patched, stock, features)


def test_no_tensor_is_larger_than_the_scores_at_a_time():
    """The largest tensor made, of NeMo's and of ours, for 4000 frames against 1000 codes of 4 dimensions."""
    patched, stock = build_pair(num_classes=1000)
    features = torch.randn(1, 6, 4000)
    with mock.patch.object(quantizers, 'SCORES_AT_A_TIME_ON_CPU', 50_000):
        with LargestTensor() as ours:
            patched(input_signal=features)
        with LargestTensor() as theirs:
            stock(input_signal=features)
    assert theirs.elements == 4000 * 1000 * 4
    assert ours.elements == 50_000


def test_autocast_changes_no_token():
    torch.manual_seed(3)
    quantizer, _ = build_pair(num_classes=300)
    features = torch.randn(2, 6, 100)
    expected = quantizer(input_signal=features)[1]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(quantizer(input_signal=features)[1], expected)


def test_by_default_weights_and_random_numbers_are_nemos():
    states = []
    for made in (RandomProjectionVectorQuantizer, StockQuantizer):
        torch.manual_seed(0)
        weights = made(6, 4, 50, 2, 'l2', combine_time_steps=2).state_dict()
        states.append({**weights, 'the next random number': torch.rand(1)})
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def write_projection(path, **changed):
    """Write the file of 2 combined frames of 6 features; return its arrays."""
    rng = np.random.default_rng(0)
    arrays = dict(
        components=np.linalg.qr(rng.standard_normal((12, 12)))[0][:8],
        eigenvalues=np.linspace(9, 1, 8),
        combine_time_steps=2,
        features=6,
        normalization='per_feature',
    )
    arrays.update(changed)
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return arrays


def with_projection(path, **changed):
    arguments = dict(feat_in=6, code_dim=4, num_classes=50, num_books=2, combine_time_steps=2, projection='pca')
    return RandomProjectionVectorQuantizer(**{**arguments, **changed}, projection_file=path)


class TestPrincipalComponents:
    @pytest.mark.parametrize('time_ahead', [False, True])
    def test_each_book_sees_its_components_of_frames_one_after_the_other_at_unit_variance(self, tmp_path, time_ahead):
        arrays = write_projection(tmp_path / 'pca.npz')
        quantizer = with_projection(tmp_path / 'pca.npz', time_ahead=time_ahead)
        features = torch.randn(1, 6, 9)
        tokens = quantizer(input_signal=features.transpose(1, 2) if time_ahead else features)[1]
        for target in range(4):
            frames = [*features[0, :, 2 * target], *features[0, :, 2 * target + 1]]
            scores = arrays['components'] @ np.array(frames) / np.sqrt(arrays['eigenvalues'])
            for book in range(2):
                of_book = scores[4 * book : 4 * book + 4]
                distances = np.linalg.norm(
                    quantizer.codebooks[book].numpy() - of_book / np.linalg.norm(of_book), axis=1
                )
                assert tokens[0, target, book] == distances.argmin()

    def test_codebooks_and_random_numbers_are_those_of_a_random_projection(self, tmp_path):
        write_projection(tmp_path / 'pca.npz')
        torch.manual_seed(0)
        codebooks, number = with_projection(tmp_path / 'pca.npz').codebooks, torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(with_projection(None, projection='random').codebooks, codebooks)
        assert torch.equal(torch.rand(1), number)

    def test_a_model_that_is_restored_needs_no_file(self, tmp_path, monkeypatch):
        write_projection(tmp_path / 'pca.npz')
        saved = with_projection(tmp_path / 'pca.npz')
        for gone in (None, tmp_path / 'gone.npz'):
            with pytest.raises(ValueError, match='^model.quantizer.projection_file .*(None|gone.npz) cannot be read'):
                with_projection(gone)
            monkeypatch.setattr(AppState(), 'is_model_being_restored', True)
            restored = with_projection(gone)
            monkeypatch.undo()
            restored.load_state_dict(saved.state_dict())
            assert torch.equal(restored.proj.weight, saved.proj.weight)

    @pytest.mark.parametrize(
        'written, asked, message',
        [
            ({}, dict(combine_time_steps=8), 'was made for .*combine_time_steps.: 2.*; the quantizer has 8 and 6'),
            (
                {},
                dict(code_dim=5),
                'has 8 components with a variance; num_books .* takes 10: make it with --components 10 or',
            ),
            (dict(eigenvalues=np.array([1.0] * 7 + [0])), {}, 'has 7 components with a variance; .* takes 8'),
            (
                dict(eigenvalues=None),
                {},
                'cannot be read: .*eigenvalues.*; .* it must be what compute_feature_stats.py',
            ),
        ],
    )
    def test_a_file_that_does_not_fit(self, tmp_path, written, asked, message):
        write_projection(tmp_path / 'pca.npz', **written)
        with pytest.raises(ValueError, match=f'^model.quantizer.projection_file .*pca.npz:? {message}'):
            with_projection(tmp_path / 'pca.npz', **asked)
