# SPDX-License-Identifier: Apache-2.0
"""Contexts of the layers' own: what each layer sees, how it is streamed, and that nothing else changes.

Shapes: B batch, A attention frames.
"""

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from attention_windows import attended
from fresh_process import run_python
from omegaconf import OmegaConf
from tiny_encoder import KERNEL, encode, tiny_encoder
from tiny_nest import STOCK_OFFLINE, tiny_model
from tiny_recogniser import tiny_recogniser

from nemo.collections.asr.parts.att_context import AttContext, receptive_field

FRAMES = 24
ATTENTIONS = list(itertools.product(['rel_pos', 'abs_pos'], [False, True]))
REGULAR, CHUNKED = dict(att_context_style='regular'), dict(att_context_style='chunked_limited')

# style, contexts of the batch, contexts of the layers
HIERARCHIES = [
    (REGULAR, [[8, 0], [4, 0], [-1, 0]], [[0, [2, 0]], [1, [4, 0]], [3, [8, 0]]]),
    (REGULAR, [[-1, -1]], [[2, 1], [-1, 0], None, [3, -1]]),
    (REGULAR, [[6, 2]], [[2, 1], [6, 2], [0, 0], [4, 0]]),
    (CHUNKED, [[8, 3], [4, 1]], [[0, [4, 3]], [2, [8, -1]]]),
    (CHUNKED, [[8, 3]], [[4, 1], [8, 0], [0, 3], None]),
]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def intersection(batch, own):
    sides = [[side for side in pair if side >= 0] for pair in zip(batch, own or [-1, -1])]
    return [min(side) if side else -1 for side in sides]


def expected_dependences(batch, layers, style):
    """Which input frame each layer's output may depend on, [A, A] bool for each layer."""
    depends, dependences = torch.eye(FRAMES), []
    convolved = sum(torch.ones(FRAMES - back).diag(-back) for back in range(KERNEL))
    for own in layers:
        depends = (attended(intersection(batch, own), style, FRAMES).float() @ depends + depends).clamp(max=1)
        depends = (convolved @ depends).clamp(max=1)
        dependences.append(depends.bool())
    return dependences


def found_dependences(encoder):
    """The same, found by changing one input frame of the first layer at a time."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in encoder.layers]
    encoder.double()  # float32 rounds small changes away, and which ones depends on the build of torch
    frames = torch.randn(1, FRAMES, encoder.d_model, dtype=torch.float64).expand(FRAMES, -1, -1)
    changed = frames + 3 * torch.eye(FRAMES).unsqueeze(-1) * torch.randn(encoder.d_model, dtype=torch.float64)
    encode(encoder, frames)
    encode(encoder, changed)
    for hook in hooks:
        hook.remove()
    before, after = outputs[: len(encoder.layers)], outputs[len(encoder.layers) :]
    return [(first != second).any(dim=-1).T for first, second in zip(before, after)]  # query, key


class TestWhatEachLayerSees:
    @pytest.mark.parametrize('blockwise', ['off', 'on'])
    @pytest.mark.parametrize('model, sdpa', ATTENTIONS)
    @pytest.mark.parametrize('style, batches, layers', HIERARCHIES)
    def test_a_changed_frame_changes_exactly_what_may_see_it(self, blockwise, model, sdpa, style, batches, layers):
        encoder = tiny_encoder(
            blockwise_attention=blockwise,
            self_attention_model=model,
            use_pytorch_sdpa=sdpa,
            att_context_size=batches,
            layer_att_context_size=layers,
            xscaling=False,
            **style,
        )
        owns = [None if own is None else own.as_list() for own in encoder.layer_att_contexts()]
        for batch in batches:
            with encoder.using_att_context_size(batch):
                found = found_dependences(encoder)
            expected = expected_dependences(batch, owns, style['att_context_style'])
            for index, (seen, may_see) in enumerate(zip(found, expected)):
                assert torch.equal(seen, may_see), f'layer {index} in {batch}'
            field = receptive_field(encoder, batch)
            if field.left >= 0:
                query, key = expected[-1].nonzero().T
                assert (query - key).max() == min(field.left, FRAMES - 1)
                assert (key - query).max() == min(field.right, FRAMES - 1)

    def test_an_attribute_binds_one_layer_and_unset_leaves_no_trace(self):
        encoder, by_method = (tiny_encoder(att_context_size=[8, 2]) for _ in range(2))
        frames, lengths = torch.randn(3, FRAMES, 16), torch.tensor([FRAMES, 17, 5])
        before = encode(encoder, frames, lengths)
        encoder.layers[2].self_attention.att_context_size = [2, 0]
        by_method.set_layer_att_context_size([None, None, [2, 0], None])
        assert encoder.layer_att_contexts() == by_method.layer_att_contexts() == (None, None, AttContext(2, 0), None)
        assert not torch.equal(encode(encoder, frames, lengths), before)
        encoder.layers[2].self_attention.att_context_size = None
        by_method.set_layer_att_context_size(None)
        for each in (encoder, by_method):
            assert torch.equal(encode(each, frames, lengths), before)

    def test_a_copy_follows_its_own_contexts(self):
        encoder = tiny_encoder(att_context_size=[8, 0], layer_att_context_size=[[0, [4, 0]]])
        for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            twin.layers[1].self_attention.att_context_size = [2, 0]
            assert twin.tightest_left_context() == 2 and encoder.tightest_left_context() == 4


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        'batches, style, layers, message',
        [
            ([8, 0], REGULAR, [[0, [4, 0]], [2, [8, 1]]], r'item 1, \[2, \[8, 1\]\]: the right context is 1, beyond'),
            ([[8, 0], [8, 2]], REGULAR, [[0, [4, 3]]], r'item 0, .*: the right context is 3, .* at most 2'),
            ([8, 3], CHUNKED, [[0, [4, 3]], [2, [6, 3]]], r'item 1, .*: the left context is 6; .* chunk, 4 frames'),
            ([8, 3], CHUNKED, [[0, [4, 2]]], r'item 0, .*: the right context is 2; .* divisor'),
            ([8, 0], REGULAR, [[4, [4, 0]]], r'item 0, .*: the layer is 4; .* from 0 to 3'),
        ],
    )
    def test_a_bad_item_is_named(self, batches, style, layers, message):
        with pytest.raises(ValueError, match=r'^encoder.layer_att_context_size: ' + message):
            tiny_encoder(att_context_size=batches, layer_att_context_size=layers, **style)
        encoder = tiny_encoder(att_context_size=batches, **style)
        with pytest.raises(ValueError, match=message):
            encoder.set_layer_att_context_size(layers)
        assert encoder.layer_att_contexts() == (None,) * 4

    def test_a_bad_context_of_an_attribute_is_named_as_it_was_given(self):
        attention = (
            tiny_encoder(att_context_size=[8, 0], layer_att_context_size=[[0, [4, 0]]]).layers[1].self_attention
        )
        with pytest.raises(ValueError, match=r'item 1, \[4, 9\]: the right context is 9, .*\[\[4, 0\], \[4, 9\], '):
            attention.att_context_size = [4, 9]
        assert attention.att_context_size == [4, 0]

    def test_local_attention_cannot_follow(self):
        encoder = tiny_encoder(self_attention_model='rel_pos_local_attn', att_context_size=[4, 4])
        for narrow in (
            lambda: encoder.set_layer_att_context_size([[0, [4, 0]]]),
            lambda: setattr(encoder.layers[0].self_attention, 'att_context_size', [2, 0]),
            lambda: encoder.check_att_context_ceiling(AttContext(2, 0), 'ceiling'),
        ):
            with pytest.raises(ValueError, match='rel_pos_local_attn'):
                narrow()

    def test_another_attention_model_keeps_the_contexts_or_is_refused(self):
        encoder = tiny_encoder(att_context_size=[8, 0], layer_att_context_size=[[0, [4, 0]]])
        encoder._cfg = OmegaConf.create(
            dict(d_model=16, dropout=0.0, pos_emb_max_len=64, dropout_emb=0.0, dropout_att=0.0, n_heads=2)
        )
        with pytest.raises(ValueError, match='rel_pos_local_attn'):
            encoder.change_attention_model('rel_pos_local_attn', [8, 8])
        encoder.change_attention_model('abs_pos')
        encoder.layers[0].self_attention.att_context_size = [2, 0]
        assert [context.left for context in encoder.layer_att_contexts()] == [2, 4, 4, 4]
        found = found_dependences(encoder.eval())[0]
        assert torch.equal(found, expected_dependences([8, 0], [[2, 0]], 'regular')[0])


class TestCeiling:
    def test_it_narrows_what_is_drawn_in_training_only(self):
        encoder = tiny_encoder(att_context_size=[[8, 0], [4, 0], [-1, 0]])
        encoder.train()
        drawn = [encoder.draw_att_context_size(step).left for step in range(40)]
        encoder.att_context_policy = replace(encoder.att_context_policy, ceiling=AttContext(6, 0))
        assert [encoder.draw_att_context_size(step).left for step in range(40)] == [
            6 if left in (-1, 8) else 4 for left in drawn
        ]
        assert encoder.tightest_left_context() == 6
        encoder.eval()
        assert encoder.draw_att_context_size(0) == AttContext(8, 0) and encoder.tightest_left_context() == 8

    def test_tightest_covers_batch_layers_and_ceiling(self):
        encoder = tiny_encoder(att_context_size=[[-1, 0], [3, 0]], layer_att_context_size=[[1, [4, 0]], [2, [8, 0]]])
        assert encoder.train().tightest_left_context() == 4
        with encoder.using_att_context_size([3, 0]):
            assert encoder.tightest_left_context() == 3
        encoder.att_context_policy = replace(encoder.att_context_policy, ceiling=AttContext(2, 0))
        assert encoder.tightest_left_context() == 2


def stream(encoder, frames, lengths, chunk, shift):
    """Run the layers chunk by chunk with caches, on [B, A, d_model]; returns [B, A, d_model]."""
    caches, outputs = encoder.get_initial_cache_state(batch_size=frames.shape[0]), []
    for start in range(0, frames.shape[1], shift):
        piece = frames[:, start : start + chunk]
        piece = torch.nn.functional.pad(piece, (0, 0, 0, chunk - piece.shape[1]))
        encoded = encoder(
            audio_signal=piece,
            length=(lengths - start).clamp(0, chunk),
            cache_last_channel=caches[0],
            cache_last_time=caches[1],
            cache_last_channel_len=caches[2],
            bypass_pre_encode=True,
        )
        output, _, *caches = encoder.streaming_post_process(encoded)
        outputs.append(output[:, :, :shift])
    return torch.cat(outputs, dim=-1).transpose(1, 2)[:, : frames.shape[1]]


class TestStreaming:
    @pytest.mark.parametrize('sdpa', [False, True])
    @pytest.mark.parametrize(
        'style, batches, layers, chunks',
        [
            (REGULAR, [[8, 0], [4, 0], [-1, 0]], [[0, [2, 0]], [1, [4, 0]], [3, [8, 0]]], [None, 1, 3, 4]),
            (REGULAR, [[8, 0], [-1, 0]], [[0, [2, 0]], [3, [-1, 0]]], [None, 5]),
            (REGULAR, [[6, 2]], [[2, 1], [6, 2], [0, 0], [4, 0]], [None]),
            (REGULAR, [[6, 0]], [[0, [0, 0]]], [None, 4]),
            (CHUNKED, [[8, 3], [4, 1], [-1, 3]], [[0, [4, 3]], [2, [8, -1]]], [None, 8]),
            (CHUNKED, [[12, 2], [-1, 5]], [[0, [6, 2]], [2, [6, 0]], [3, [-1, -1]]], [None]),
        ],
    )
    def test_it_equals_the_offline_forward(self, sdpa, style, batches, layers, chunks):
        contexts = dict(att_context_size=batches, layer_att_context_size=layers)
        encoder = tiny_encoder(std=0.2, use_pytorch_sdpa=sdpa, **contexts, **style)
        frames, lengths = torch.randn(3, 31, 16), torch.tensor([31, 18, 5])
        for batch, chunk in itertools.product(batches, chunks):
            encoder.set_default_att_context_size(batch)
            encoder.setup_streaming_params(chunk_size=chunk, shift_size=chunk, max_context=31)
            shift = chunk or (1 + batch[1] if style is CHUNKED else 1)
            chunk = shift + encoder.streaming_cfg.cache_drop_size
            offline = encode(encoder, frames, lengths)
            streamed = stream(encoder, frames, lengths, chunk, shift)
            for index, length in enumerate(lengths):
                error = (offline[index, :length] - streamed[index, :length]).abs().max()
                assert error < 1e-5, (batch, chunk, index)

    @pytest.mark.parametrize(
        'batch, layers, cache',
        [
            ([-1, 0], [[0, [4, 0]], [2, [12, 0]]], 12),
            ([8, 0], [[0, [4, 0]], [2, [12, 0]]], 8),
            ([-1, 0], [[0, [4, 0]], [3, [-1, 0]]], 10000),
            ([-1, 0], [[1, [4, 0]]], 10000),
            ([8, 0], [[0, [4, 0]]], 4),
        ],
    )
    def test_the_cache_is_as_long_as_the_largest_left_context(self, batch, layers, cache):
        encoder = tiny_encoder(att_context_size=batch, layer_att_context_size=layers)
        assert encoder.streaming_cfg.last_channel_cache_size == cache
        assert encoder.get_initial_cache_state(batch_size=2)[0].shape == (4, 2, cache, 16)
        encoder.set_layer_att_context_size(None)
        assert encoder.streaming_cfg.last_channel_cache_size == (batch[0] if batch[0] >= 0 else 10000)

    def test_it_follows_later_changes_with_the_same_arguments(self):
        encoder = tiny_encoder(att_context_size=[[8, 0], [6, 0]], layer_att_context_size=[[0, [4, 0]]])
        encoder.setup_streaming_params(chunk_size=4, shift_size=4)
        encoder.layers[0].self_attention.att_context_size = [8, 0]
        assert encoder.streaming_cfg.last_channel_cache_size == 8 and encoder.streaming_cfg.valid_out_len == 4
        encoder.set_default_att_context_size([6, 0])
        assert encoder.streaming_cfg.last_channel_cache_size == 6 and encoder.streaming_cfg.valid_out_len == 1

    def test_look_ahead_adds_up_over_layers(self):
        encoder = tiny_encoder(att_context_size=[6, 2], layer_att_context_size=[[2, 1], [6, 2], [0, 0], [4, -1]])
        assert encoder.streaming_cfg.cache_drop_size == 1 + 2 + 0 + 2
        assert encoder.streaming_cfg.chunk_size == [1 + 8 * 5, 8 + 8 * 5]
        assert encoder.streaming_cfg.shift_size == [1, 8] and encoder.streaming_cfg.valid_out_len == 1
        encoder.setup_streaming_params(chunk_size=8, shift_size=4)
        with pytest.raises(ValueError, match='chunk_size must be .* 5 more than shift_size'):
            encoder.get_initial_cache_state()

    def test_what_cannot_be_streamed_is_refused_when_a_stream_begins(self):
        encoder = tiny_encoder(att_context_size=[-1, -1], layer_att_context_size=[[0, [4, 1]], [2, [8, -1]]])
        encode(encoder, torch.randn(1, FRAMES, 16))
        encoder.setup_streaming_params()
        with pytest.raises(ValueError, match=r'\[-1, -1\] cannot be streamed: .* that of a layer, is unlimited'):
            encoder.get_initial_cache_state()
        encoder.set_default_att_context_size([8, 1])
        assert encoder.streaming_cfg.cache_drop_size == 4 and encoder.get_initial_cache_state()
        chunked = tiny_encoder(att_context_size=[[8, 3], [-1, -1]], layer_att_context_size=[[0, [4, -1]]], **CHUNKED)
        chunked.setup_streaming_params(chunk_size=6, shift_size=6)
        with pytest.raises(ValueError, match='must be a multiple of 4'):
            chunked.get_initial_cache_state()
        with pytest.raises(ValueError, match='self_attention_model is abs_pos'):
            tiny_encoder(self_attention_model='abs_pos', att_context_size=[8, 0]).get_initial_cache_state()
        chunked.set_default_att_context_size([-1, -1])
        with pytest.raises(ValueError, match=r'att_context_size \[-1, -1\] cannot be streamed'):
            chunked.get_initial_cache_state()


SCHEDULE = [[0, [4, 0]], [2, [8, 0]]]


def lefts(model):
    return [context and context.left for context in model.encoder.layer_att_contexts()]


@pytest.fixture(scope='class')
def saved(tmp_path_factory):
    """A hierarchical SSL model and the ``.nemo`` file it was saved to."""
    model = tiny_model(*STOCK_OFFLINE, 'model.encoder.n_layers=4', f'+model.encoder.layer_att_context_size={SCHEDULE}')
    path = tmp_path_factory.mktemp('saved') / 'ssl.nemo'
    model.save_to(str(path))
    return model, path


class TestSavedModels:
    @pytest.mark.integration
    def test_a_restored_model_has_them(self, saved):
        model, path = saved
        restored = type(model).restore_from(str(path), map_location='cpu')
        assert lefts(restored) == lefts(model) == [4, 4, 8, 8]
        assert restored.cfg.encoder.layer_att_context_size == SCHEDULE
        frames = torch.randn(1, FRAMES, 16)
        assert torch.equal(encode(restored.encoder.eval(), frames), encode(model.encoder.eval(), frames))

    @pytest.mark.integration
    def test_those_set_at_run_time_are_saved_too(self, tmp_path):
        layers = 'model.encoder.n_layers=4', f'+model.encoder.layer_att_context_size={SCHEDULE}'
        model, path = tiny_recogniser('ctc', *layers), str(tmp_path / 'ctc.nemo')
        model.encoder.set_layer_att_context_size(None)
        assert 'layer_att_context_size' not in model.encoder._cfg
        model.encoder.layers[1].self_attention.att_context_size = [2, 0]
        assert model.encoder._cfg.layer_att_context_size == [None, [2, 0], None, None]
        model.save_to(path)
        assert lefts(type(model).restore_from(path, map_location='cpu')) == [None, 2, None, None]

    def test_weights_have_no_key_of_their_own(self):
        """Torch's distributed checkpoints need an attribute for every key."""
        encoder = tiny_encoder(layer_att_context_size=SCHEDULE)
        assert encoder.state_dict().keys() == tiny_encoder(blockwise_attention='on').state_dict().keys()
        assert not [name for name in encoder.state_dict() if 'context' in name or 'draw' in name]

    @pytest.mark.integration
    def test_stock_nemo_refuses_a_file_with_them(self, saved):
        name = 'EncDecDenoiseMaskedTokenPredModel'
        script = f'from nemo.collections.asr.models.ssl_models import {name}\n{name}.restore_from({str(saved[1])!r})'
        done = run_python('-c', script, patched=False)
        assert done.returncode != 0 and 'layer_att_context_size' in done.stderr
