# SPDX-License-Identifier: Apache-2.0
"""Weights are prepared once for all sessions, and anew when they change."""

import gc
import re
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from live_streams import noise, offline
from omegaconf import open_dict
from tiny_encoder import with_adapter
from tiny_nest import POST_CONV, tiny_config, tiny_model

from nemo.collections.asr.modules import ConformerEncoder
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.streaming import layers, prepared_weights
from nemo.collections.asr.parts.streaming.prepared_weights import check_encoder_can_stream
from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.common.parts.adapter_modules import LinearAdapterConfig

CONTEXT = [4, 0]


def encoded(model):
    return StreamingSession(model, 1, CONTEXT).step(noise(1, 9000)).encoded


def expected(model):
    return offline(model, noise(1, 9000), [9000], CONTEXT)[2][:, :, :7]


@pytest.fixture
def model():
    adaptable = 'model.encoder._target_=nemo.collections.asr.modules.conformer_encoder.ConformerEncoderAdapter'
    return tiny_model('model.encoder.n_layers=2', adaptable).eval()


def write(model):
    with torch.no_grad():
        model.encoder.layers[1].feed_forward2.linear2.weight.mul_(1.5)


def replace(model):
    layer = model.encoder.layers[0].norm_out
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def move(model):
    linear = model.encoder.layers[0].self_attn.linear_q
    linear.weight.data = linear.weight.data * 2


def write_unseen(model):
    model.encoder.layers[0].self_attn.linear_v.weight.data.mul_(3)  # not counted in the version of the parameter


def exchange(model):
    model.encoder.layers[1].feed_forward1.linear2 = torch.nn.Linear(64, 16)


def set_plain(model):
    model.encoder.layers[0].fc_factor = 1.5


def add_adapter(model):
    with_adapter(model.encoder, LinearAdapterConfig(in_features=16, dim=4))


@pytest.mark.parametrize('change', [write, replace, move, write_unseen, exchange, set_plain, add_adapter])
def test_weights_are_taken_when_a_session_is_made_and_reset(model, change):
    session, whole = (StreamingSession(model, 1, CONTEXT) for _ in range(2))
    samples = noise(1, 9000)
    before = whole.step(samples).encoded
    first = session.step(samples[:, :4000]).encoded
    change(model)
    mixed = torch.cat((first, session.step(samples[:, 4000:]).encoded), 2)
    torch.testing.assert_close(mixed, before, atol=1e-5, rtol=0)  # a running stream keeps those that it began with
    changed = expected(model)
    assert not torch.allclose(before[:, :, :7], changed, atol=1e-3)
    session.reset()
    for found in (encoded(model), session.step(samples).encoded):
        torch.testing.assert_close(found[:, :, :7], changed, atol=1e-5, rtol=0)


class LoRA(torch.nn.Linear):
    """A linear layer with a low-rank update, as adapter libraries make them."""

    def forward(self, x):
        return super().forward(x) + x @ torch.ones(self.in_features, self.out_features)


def wrap(path):
    def change(model):
        *parents, name = path.split('.')
        owner = model.get_submodule('.'.join(parents))
        old = getattr(owner, name)
        new = LoRA(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict(), strict=False)
        setattr(owner, name, new)

    return change


def add_hook(path):
    return lambda model: model.get_submodule(path).register_forward_pre_hook(lambda module, inputs: None)


def patch_forward(path):
    return lambda model: setattr(model.get_submodule(path), 'forward', lambda *args: args)


def change_activation(model):
    model.encoder.layers[1].conv.activation = torch.nn.ReLU()


def subclass_encoder(model):
    class Louder(type(model.encoder)):
        def forward_internal(self, *args, **kwargs):
            encoded, *others = super().forward_internal(*args, **kwargs)
            return encoded * 2, *others

    model.encoder.__class__ = Louder


WRAPPED = ('layers.0.self_attn.linear_pos', 'layers.1.feed_forward2.linear2', 'pre_encode.out')


@pytest.mark.parametrize(
    'change, place',
    [
        (subclass_encoder, 'encoder is a Louder with a forward_internal'),
        (patch_forward('encoder.pre_encode'), 'encoder.pre_encode is a ConvSubsampling with a forward'),
        (patch_forward('encoder.layers.0.feed_forward2'), 'layers.0.feed_forward2 is a ConformerFeedForward'),
        (change_activation, 'layers.1.conv.activation is a ReLU'),
        (add_hook('encoder.layers.1.norm_out'), 'layers.1.norm_out has forward hooks'),
        (add_hook('encoder.pre_encode.conv.0'), 'pre_encode.conv.0 has forward hooks'),
        *((wrap(f'encoder.{part}'), f'{part} is a LoRA') for part in WRAPPED),
    ],
)
def test_what_streams_do_not_compute_is_named_and_refused(model, change, place):
    session = StreamingSession(model, 1, CONTEXT)
    whole = StreamingSession(model, 1, CONTEXT).step(noise(1, 9000)).encoded
    first = session.step(noise(1, 9000)[:, :4000]).encoded
    assert session.why_not_fast is None
    change(model)
    assert re.search(place, session.why_not_fast)
    for make in (session.reset, lambda: StreamingSession(model, 1, CONTEXT)):
        with pytest.raises(ValueError, match=place):
            make()
    rest = session.step(noise(1, 9000)[:, 4000:]).encoded  # the refused reset has changed nothing
    torch.testing.assert_close(torch.cat((first, rest), 2), whole, atol=1e-5, rtol=0)


def test_threads_that_start_at_once_prepare_them_once(model, monkeypatch):
    made, prepare = [], prepared_weights.PreparedEncoder.__init__

    def count(self, *args):
        made.append(self)
        prepare(self, *args)

    def extend(self, *args):
        time.sleep(0.01)  # other threads get here
        extend_pe(self, *args)

    extend_pe = layers.RelPositionalEncoding.extend_pe
    monkeypatch.setattr(layers.RelPositionalEncoding, 'extend_pe', extend)
    monkeypatch.setattr(prepared_weights.PreparedEncoder, '__init__', count)
    with ThreadPoolExecutor(8) as threads:
        sessions = list(threads.map(lambda _: StreamingSession(model, 1, CONTEXT), range(8)))
    assert len(made) == 1
    assert len({session._runner.layers[0].table for session in sessions}) == 1


def test_they_go_with_their_encoder():
    model = tiny_model().eval()
    encoder = weakref.ref(model.encoder)
    encoded(model)
    del model
    gc.collect()
    assert encoder() is None


def test_weights_of_a_model_that_streamed_can_be_trained(model):
    encoded(model)
    model.train()
    out, _ = model.encoder(audio_signal=torch.randn(1, 80, 64), length=torch.tensor([64]))
    out.sum().backward()
    assert model.encoder.layers[0].self_attn.linear_pos.weight.grad is not None


def encoder_of(**changed) -> ConformerEncoder:
    cfg = tiny_config().model.encoder
    with open_dict(cfg):
        cfg.update(changed)
    arguments = {key: value for key, value in cfg.items() if key != '_target_'}
    torch.manual_seed(0)
    return ConformerEncoder(**arguments).eval()


@pytest.mark.parametrize(
    'changed, context, reason',
    [
        (dict(conv_context_size=None), (4, 0), r'conv_context_size is \[4, 4\]; it must be causal'),
        (dict(causal_downsampling=False), (4, 0), 'causal_downsampling is False'),
        (dict(subsampling='vggnet'), (4, 0), 'subsampling is vggnet'),
        (dict(conv_norm_type='group_norm4'), (4, 0), 'conv_norm_type is group_norm4'),
        (dict(conv_norm_type='instance_norm'), (4, 0), 'conv_norm_type is instance_norm'),
        (dict(self_attention_model='abs_pos'), (4, 0), 'self_attention_model is abs_pos'),
        (dict(), (-1, -1), 'the right context of layer 0 is unlimited'),
        (dict(att_context_style='chunked_limited', att_context_size=[[4, 1]]), (3, 1), 'must be a multiple'),
        (
            dict(reduction='pooling', reduction_position=0, reduction_factor=2),
            (4, 0),
            'encoder.reduction_position is 0; it must be None',
        ),
        (dict(subsampling_conv_chunking_factor=2), (4, 0), 'subsampling_conv_chunking_factor is 2'),
    ],
)
def test_what_cannot_stream_is_refused_with_the_reason(changed, context, reason):
    with pytest.raises(ValueError, match=reason):
        check_encoder_can_stream(encoder_of(**changed), AttContext(*context))


def test_nemos_own_streaming_is_set_up_alike_with_masking_after_the_convolutions():
    post_conv = tiny_model(*POST_CONV).encoder
    pre_conv = tiny_model().encoder
    for encoder in (pre_conv, post_conv):
        encoder.set_default_att_context_size([10, 0])
    assert vars(post_conv.streaming_cfg) == vars(pre_conv.streaming_cfg)
    assert pre_conv.streaming_cfg.chunk_size == [1, 8]
