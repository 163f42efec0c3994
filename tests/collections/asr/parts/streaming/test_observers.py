# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo.collections.asr.parts.streaming.observers import Observers


def observers(combined=2, target_normalize='per_feature'):
    """Observers of a stream of one feature whose tokens are what the quantizer was given, [S, combined]."""

    def quantizer(input_signal):
        return None, input_signal[0, 0].view(1, -1, combined)

    quantizer.combine_time_steps = combined
    made = dict(
        pre_encoder=None, quantizer=quantizer, target_normalize=target_normalize, encoder=torch.nn.Linear(1, 1)
    )
    return Observers(SimpleNamespace(**made), None, 1, 1, apply_mask=False, return_surprise=False)


def made_of(observers, frames, sizes=()):
    """Give frames [F, M] in pieces of these sizes and the rest at once; return the tokens, and the state after."""
    stream = observers.new_stream()
    pieces = [piece for piece in frames.split([*sizes, frames.shape[1] - sum(sizes)], dim=1) if piece.shape[1]]
    made = [tokens for tokens in (observers.tokens(stream, piece) for piece in pieces) if tokens is not None]
    return (torch.cat(made) if made else None), stream


def test_a_token_is_standardised_by_all_frames_up_to_its_last():
    tokens, stream = made_of(observers(), torch.tensor([[0.0, 2.0, 4.0, 4.0, 9.0]]))
    # of 0 and 2 the mean is 1 and the variance 2; of 0, 2, 4 and 4 they are 2.5 and 11 / 3; 9 waits
    expected = torch.tensor([[-1 / 2**0.5, 1 / 2**0.5], [1.5 / (11 / 3) ** 0.5] * 2])
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=0)
    assert stream.waiting.tolist() == [[9.0]] and stream.count == 5
    assert (stream.total.item(), stream.squares.item()) == (19.0, 117.0)


def test_without_normalisation_the_frames_go_as_they_are():
    tokens, _ = made_of(observers(target_normalize=None), torch.tensor([[0.0, 2.0, 4.0, 4.0]]), sizes=[1])
    assert tokens.tolist() == [[0.0, 2.0], [4.0, 4.0]]


@given(st.lists(st.integers(0, 30), max_size=6), st.sampled_from([1, 2, 8]))
def test_tokens_do_not_depend_on_the_cutting(sizes, combined):
    frames = torch.randn(1, sum(sizes) + 20, generator=torch.Generator().manual_seed(len(sizes))) * 5 - 12
    at_once, after = made_of(observers(combined), frames)
    cut, after_cut = made_of(observers(combined), frames, sizes)
    torch.testing.assert_close(cut, at_once, atol=1e-6, rtol=1e-6)
    assert torch.equal(after.waiting, after_cut.waiting) and after.count == after_cut.count
