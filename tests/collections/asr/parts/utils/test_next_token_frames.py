# SPDX-License-Identifier: Apache-2.0
"""Next tokens decoded from the frames that count, one horizon after the other: the loss of all log-probabilities.

Shapes: B batch, D the encoder's width, T encoder frames, S target frames, K horizons, C classes, H codebooks.
"""

import pytest
import torch

from nemo.collections.asr.losses.ssl_losses.next_token import NextTokenLoss
from nemo.collections.asr.modules.ssl_modules.multi_softmax_decoder import MultiSoftmaxDecoder
from nemo.collections.asr.parts.utils.next_token_frames import (
    of_horizons,
    predictions_of_horizons,
    select_next_token_frames,
)

WIDTH, CLASSES, HORIZONS = 6, 5, 3
LENGTHS = torch.tensor([9, 4, 1])
TOKEN_LENGTHS = torch.tensor([8, 4, 0])


def parts(books: int, dtype=torch.float64):
    """Return decoders, their loss, encoder frames [3, D, 9] and tokens."""
    torch.manual_seed(0)
    decoders = torch.nn.ModuleList(
        MultiSoftmaxDecoder(WIDTH, CLASSES, num_decoders=books, squeeze_single=True).to(dtype) for _ in range(HORIZONS)
    )
    encoded = torch.randn(3, WIDTH, 9, dtype=dtype, requires_grad=True)
    tokens = torch.randint(0, CLASSES, (3, 8) if books == 1 else (3, 8, books))
    return decoders, NextTokenLoss(HORIZONS, books, squeeze_single=True), encoded, tokens


def gradients(loss, decoders, encoded):
    return torch.autograd.grad(loss, [encoded, *decoders.parameters()])


@pytest.mark.parametrize('books', [1, 2])
@pytest.mark.parametrize('offset', [0, 2, 7, 20])
def test_loss_and_gradients_are_those_of_all_log_probabilities(books, offset):
    decoders, loss, encoded, tokens = parts(books)
    selected = select_next_token_frames(loss, encoded, tokens, offset, LENGTHS, TOKEN_LENGTHS)
    found = of_horizons(decoders, loss, selected)
    log_probs = torch.stack([decoder(encoder_output=encoded) for decoder in decoders], dim=2)
    whole = loss(
        decoder_outputs=log_probs,
        targets=tokens,
        offset=offset,
        decoder_lengths=LENGTHS,
        target_lengths=TOKEN_LENGTHS,
    )
    torch.testing.assert_close(found.mean, whole, rtol=0, atol=1e-9)
    pairs = zip(gradients(found.mean, decoders, encoded), gradients(whole, decoders, encoded))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_each_horizon_is_named_and_its_frames_are_counted():
    decoders, loss, encoded, tokens = parts(books=1)
    selected = select_next_token_frames(loss, encoded, tokens, 0, LENGTHS, TOKEN_LENGTHS)
    found = of_horizons(decoders, loss, selected)
    assert found.counts.tolist() == [8 + 4, 7 + 3, 6 + 2]
    assert list(found.logs()) == ['next_0', 'next_1', 'next_2']
    assert not any(value.requires_grad for value in found.logs().values())
    torch.testing.assert_close(found.logs()['next_1'], found.totals[1].detach() / 10)


@pytest.mark.parametrize('books', [1, 2])
def test_predictions_of_a_horizon_are_of_the_frames_that_count_in_it(books):
    decoders, loss, encoded, tokens = parts(books)
    selected = select_next_token_frames(loss, encoded, tokens, 1, LENGTHS, TOKEN_LENGTHS)
    counts = of_horizons(decoders, loss, selected).counts.tolist()
    for horizon, (log_probs, targets, utterances) in enumerate(predictions_of_horizons(decoders, selected)):
        assert len(log_probs) == len(targets) == len(utterances) == counts[horizon]
        frame = 3  # of the first utterance: asked for token 3 + 1 + horizon
        torch.testing.assert_close(log_probs[frame], decoders[horizon](encoder_output=encoded)[0, frame])
        torch.testing.assert_close(targets[frame], tokens[0, frame + 1 + horizon])


def test_where_no_frame_counts_the_loss_is_zero_and_there_are_no_predictions():
    decoders, loss, encoded, tokens = parts(books=1)
    selected = select_next_token_frames(loss, encoded, tokens, 8, LENGTHS, TOKEN_LENGTHS)
    assert of_horizons(decoders, loss, selected).mean == 0
    assert [len(targets) for _, targets, _ in predictions_of_horizons(decoders, selected)] == [0, 0, 0]


def test_no_log_probabilities_are_kept_for_the_backward_pass():
    decoders, loss, encoded, tokens = parts(books=1)
    selected = select_next_token_frames(loss, encoded, tokens, 0, LENGTHS, TOKEN_LENGTHS)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        of_horizons(decoders, loss, selected).mean.backward()
    assert not [shape for shape in kept if CLASSES in shape and len(selected.frames) in shape]
