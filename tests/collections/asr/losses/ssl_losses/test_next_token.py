# SPDX-License-Identifier: Apache-2.0
"""Which token each frame predicts at each horizon, and the loss of it.

Shapes: B batch, T encoder frames, S target frames, K horizons, C classes, H codebooks.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from next_token_pairs import loss_of_all_pairs

from nemo.collections.asr.losses.ssl_losses.mlm import MultiMLMLoss
from nemo.collections.asr.losses.ssl_losses.next_token import align_next_tokens, next_token_indices

NONE = -100


def by_hand(log_probs, tokens, offset, horizons, encoded_lengths, token_lengths):
    """The loss of log-probabilities [B, T, K, C, H] and tokens [B, S, H], by loops over everything."""
    total, count = 0.0, 0
    for row in range(log_probs.shape[0]):
        for frame in range(min(log_probs.shape[1], int(encoded_lengths[row]))):
            for horizon in range(horizons):
                wanted = frame + offset + horizon
                if wanted < min(int(token_lengths[row]), tokens.shape[1]):
                    books = range(tokens.shape[2])
                    chosen = [log_probs[row, frame, horizon, tokens[row, wanted, book], book] for book in books]
                    total, count = total - sum(chosen) / len(chosen), count + 1
    return total / max(count, 1), count


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_loss_and_gradient_equal_a_plain_loop(data):
    draw = data.draw
    batch, frames, targets = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    horizons, books, offset = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(0, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = torch.randn(batch, frames, horizons, 5, books, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 5, (batch, targets, books), generator=generator)
    encoded_lengths = torch.tensor(draw(st.lists(st.integers(0, frames), min_size=batch, max_size=batch)))
    token_lengths = torch.tensor(draw(st.lists(st.integers(0, targets), min_size=batch, max_size=batch)))
    squeezed = books == 1 and draw(st.booleans())
    loss = MultiMLMLoss(num_decoders=books, squeeze_single=squeezed)

    gradients, losses = [], []
    for ours in (True, False):
        leaf = logits.clone().requires_grad_()
        log_probs = leaf.log_softmax(dim=3)
        if ours:
            given_probs, given_tokens = (log_probs[..., 0], tokens[..., 0]) if squeezed else (log_probs, tokens)
            value = loss_of_all_pairs(loss, given_probs, given_tokens, offset, encoded_lengths, token_lengths)
        else:
            value, count = by_hand(log_probs, tokens, offset, horizons, encoded_lengths, token_lengths)
            value = value + 0 * log_probs.sum()
        value.backward()
        losses.append(value.detach()), gradients.append(leaf.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-9)


def test_at_the_end_of_chunks_the_last_frames_predict_what_follows_the_chunk():
    tokens = torch.arange(10, 19).unsqueeze(0)
    assert next_token_indices(8, 2, offset=0, chunk=4).tolist() == [
        [-1, -1], [-1, -1], [3, 4], [3, 4], [-1, -1], [-1, -1], [7, 8], [7, 8],
    ]  # fmt: skip
    lengths = torch.tensor([10]), torch.tensor([9])
    _, wanted, counted = align_next_tokens(torch.zeros(1, 10, 1), tokens, 2, 1, *lengths, chunk=4)
    assert wanted[0].tolist() == 2 * [[NONE, NONE]] + 2 * [[14, 15]] + 2 * [[NONE, NONE]] + 2 * [[18, NONE]]
    assert counted[0].tolist() == 2 * [False, False, True, True]


def test_without_any_next_token_the_loss_is_zero_and_back_propagates():
    logits = torch.randn(2, 3, 2, 5, requires_grad=True)
    tokens, lengths = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 3])
    loss = loss_of_all_pairs(
        MultiMLMLoss(squeeze_single=True), logits.log_softmax(dim=-1), tokens, 9, lengths, lengths
    )
    loss.backward()
    assert loss == 0 and not logits.grad.any()
