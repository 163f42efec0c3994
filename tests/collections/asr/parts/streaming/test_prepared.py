# SPDX-License-Identifier: Apache-2.0
"""Weights are prepared once for all sessions, and anew when they change."""

import copy
import gc
import weakref

import pytest
import torch
from live_streams import noise
from tiny_nest import tiny_model

from nemo.collections.asr.parts.streaming.prepared import PreparedEncoder, why_not
from nemo.collections.asr.parts.streaming.session import StreamingSession

CONTEXT = [4, 0]


def encoded(model, fast='auto'):
    return StreamingSession(model, 1, CONTEXT, fast=fast).step(noise(1, 9000)).encoded


@pytest.fixture
def model():
    return tiny_model('model.encoder.n_layers=2').eval()


def test_all_sessions_of_an_encoder_share_them(model):
    first = PreparedEncoder.of(model.encoder)
    StreamingSession(model, 3, CONTEXT).step(noise(3, 3000))
    assert PreparedEncoder.of(model.encoder) is first
    assert PreparedEncoder.of(copy.deepcopy(model.encoder)) is not first


def write(model):
    with torch.no_grad():
        model.encoder.layers[1].feed_forward2.linear2.weight.mul_(1.5)


def replace(model):
    layer = model.encoder.layers[0].norm_out
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def load(model):
    model.load_state_dict(
        {name: tensor * 1.1 for name, tensor in model.state_dict().items() if 'encoder' in name}, False
    )


def move(model):
    linear = model.encoder.layers[0].self_attn.linear_q
    linear.weight.data = linear.weight.data * 2


@pytest.mark.parametrize('change', [write, replace, load, move])
def test_a_running_session_follows_weights_that_change(model, change):
    session = StreamingSession(model, 1, CONTEXT)
    other = StreamingSession(model, 1, CONTEXT, fast='off')
    samples = noise(1, 12000)
    for each in (session, other):
        each.step(samples[:, :1])
    change(model)
    mine, expected = (each.step(samples[:, 1:9000]).encoded for each in (session, other))
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_a_new_session_sees_what_was_written_behind_torchs_back(model):
    before = encoded(model)
    model.encoder.layers[0].self_attn.linear_v.weight.data.mul_(3)  # not counted in the version of the parameter
    torch.testing.assert_close(encoded(model), encoded(model, 'off'), atol=1e-5, rtol=0)
    assert not torch.allclose(before, encoded(model), atol=1e-3)


def test_they_go_with_their_encoder():
    model = tiny_model().eval()
    encoder = weakref.ref(model.encoder)
    encoded(model)
    del model
    gc.collect()
    assert encoder() is None


def test_the_first_reason_against_them_is_told(model):
    assert why_not(model.encoder) is None
    model.encoder.layers[1].conv.activation = torch.nn.ReLU()
    assert why_not(model.encoder) == 'encoder.layers[1]: its activation is ReLU'


def test_weights_of_a_model_that_streamed_can_be_trained(model):
    encoded(model)
    model.train()
    out, _ = model.encoder(audio_signal=torch.randn(1, 80, 64), length=torch.tensor([64]))
    out.sum().backward()
    assert model.encoder.layers[0].self_attn.linear_pos.weight.grad is not None
