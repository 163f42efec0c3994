# SPDX-License-Identifier: Apache-2.0
"""Subsampling gives NeMo's frames, lengths and gradients, with fewer passes over the padding."""

import pytest
import torch

from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling, MaskedConvSequential


def build_pair(kind='dw_striding', causal=True, factor=8, activation=None, chunking=1):
    """The patched subsampling and NeMo's own with its weights."""
    arguments = dict(subsampling_conv_chunking_factor=chunking, is_causal=causal)
    pair = [
        ConvSubsampling(kind, factor, 12, 6, conv_channels=4, activation=activation or torch.nn.ReLU(), **arguments)
        for _ in range(2)
    ]
    pair[1].load_state_dict(pair[0].state_dict())
    assert type(pair[1].conv) is MaskedConvSequential
    pair[1].conv.__class__ = MaskedConvSequential.__base__
    return pair


def run(module, features, lengths):
    """Frames, their lengths, and the gradients of features and weights."""
    features = features.clone().requires_grad_()
    frames, lengths = module(features, lengths)
    weights = torch.linspace(-1, 1, frames.numel()).view_as(frames)
    (frames * weights).sum().backward()
    return frames.detach(), lengths, features.grad, *(p.grad for p in module.parameters())


def assert_alike(pair, features, lengths, **tolerance):
    for ours, theirs in zip(*(run(module, features, lengths) for module in pair), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('kind', ['dw_striding', 'striding'])
@pytest.mark.parametrize('frames', [1, 7, 40, 65])
def test_frames_lengths_and_gradients_are_nemos(kind, causal, frames):
    torch.manual_seed(frames)
    lengths = torch.tensor([frames, max(frames // 2, 1), max(frames - 3, 1)])
    assert_alike(build_pair(kind, causal, factor=4), torch.randn(3, frames, 12), lengths, rtol=1e-5, atol=1e-6)


def test_what_padding_holds_is_seen_by_no_frame():
    module, _ = build_pair()
    features, lengths = torch.randn(2, 80, 12), torch.tensor([80, 41])
    other = features.clone()
    other[1, 41:] = 1e6
    for before, after in zip(module(features, lengths), module(other, lengths)):
        assert torch.equal(before, after)


@pytest.mark.parametrize('activation', [torch.nn.Softplus(), torch.nn.Sigmoid()], ids=lambda a: type(a).__name__)
def test_an_activation_that_makes_something_of_zero_is_left_to_nemo(activation):
    pair = build_pair(activation=activation)
    assert_alike(pair, torch.randn(2, 40, 12), torch.tensor([40, 17]), rtol=0, atol=0)


def test_dtypes_are_nemos():
    module, reference = build_pair()
    features, lengths = torch.randn(2, 40, 12), torch.tensor([40, 17])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(module(features, lengths)[0], reference(features, lengths)[0])
    for dtype in (torch.bfloat16, torch.float64):
        assert module.to(dtype)(features.to(dtype), lengths)[0].dtype == dtype


def test_the_split_of_a_large_batch_takes_the_same_way():
    module, reference = build_pair(chunking=2)
    features, lengths = torch.randn(4, 40, 12), torch.tensor([40, 17, 33, 8])
    torch.testing.assert_close(module(features, lengths), reference(features, lengths))
    assert type(module.conv) is MaskedConvSequential
