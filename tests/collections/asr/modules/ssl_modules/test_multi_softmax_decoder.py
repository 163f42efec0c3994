# SPDX-License-Identifier: Apache-2.0
"""The decoder gives NeMo's log-probabilities and gradients, and keeps NeMo's way where its layers are others."""

import pytest
import torch

from nemo.collections.asr.modules.ssl_modules import multi_softmax_decoder
from nemo.collections.asr.modules.ssl_modules.multi_softmax_decoder import MultiSoftmaxDecoder

StockDecoder = multi_softmax_decoder._up.MultiSoftmaxDecoder


def run(decoder, features):
    """Log-probabilities, and the gradients of features and weights."""
    features = features.clone().requires_grad_()
    log_probs = decoder(encoder_output=features)
    weights = torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)
    (log_probs * weights).sum().backward()
    return log_probs.detach(), features.grad, *(p.grad for p in decoder.parameters())


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('books, squeeze', [(1, False), (1, True), (2, False), (3, True)])
def test_log_probabilities_and_gradients_are_nemos(books, squeeze, bias):
    torch.manual_seed(0)
    arguments = dict(feat_in=6, num_classes=5, num_decoders=books, squeeze_single=squeeze, use_bias=bias)
    patched, stock = MultiSoftmaxDecoder(**arguments), StockDecoder(**arguments)
    stock.load_state_dict(patched.state_dict())
    features = torch.randn(2, 6, 7)
    for ours, theirs in zip(run(patched, features), run(stock, features), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_layer_that_someone_watches_is_called():
    decoder, called = MultiSoftmaxDecoder(6, 5), []
    decoder.decoder_layers[0].register_forward_hook(lambda *_: called.append(True))
    decoder(encoder_output=torch.randn(1, 6, 3))
    assert called == [True]


def test_other_layers_are_run_as_nemo_runs_them():
    torch.manual_seed(0)
    decoder = MultiSoftmaxDecoder(6, 5)
    features = torch.randn(1, 6, 3)
    before = decoder(encoder_output=features)
    decoder.decoder_layers.append(torch.nn.Tanh())
    after = decoder(encoder_output=features)
    expected = torch.tanh(decoder.decoder_layers[0](features)).transpose(1, 2).unsqueeze(-1).log_softmax(dim=2)
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(before, after)
