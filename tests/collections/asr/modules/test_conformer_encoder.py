# SPDX-License-Identifier: Apache-2.0
import copy
from collections import Counter

import pytest
import torch
from fresh_process import run_python
from spies import recording_attention

from nemo.collections.asr.modules import conformer_encoder
from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder, ConformerEncoderAdapter
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.core.classes.mixins import adapter_mixins

CONTEXTS = [[4, 0], [8, 0], [-1, 0]]
STREAMING = dict(causal_downsampling=True, conv_norm_type='layer_norm', conv_context_size='causal')


def encoder(att_context_size=CONTEXTS, seed=0, **kwargs):
    settings = dict(feat_in=8, n_layers=2, d_model=16, n_heads=2, conv_kernel_size=5, subsampling='dw_striding')
    settings.update(subsampling_factor=4, subsampling_conv_channels=8, pos_emb_max_len=100, dropout=0.0)
    settings.update(dropout_pre_encoder=0.0, dropout_emb=0.0, dropout_att=0.0, att_context_size=att_context_size)
    torch.manual_seed(seed)
    return ConformerEncoder(**{**settings, **STREAMING, **kwargs})


def features(frames=64, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 8, frames, generator=generator), torch.full((batch,), frames)


@pytest.fixture
def attended():
    """The contexts that attention masks are made for."""
    with recording_attention() as contexts:
        yield contexts


def test_the_draw_is_a_pure_function_of_seed_and_step():
    one, other = encoder(), encoder(seed=1)
    torch.manual_seed(5)
    draws = [one.draw_att_context_size(step) for step in range(50)]
    assert draws == [other.draw_att_context_size(step) for step in range(50)]
    assert draws[30] == one.draw_att_context_size(30)
    reseeded = encoder(att_context_seed=1)
    assert draws != [reseeded.draw_att_context_size(step) for step in range(50)]


def test_the_draw_is_the_same_in_another_process():
    script = (
        "from nemo.collections.asr.parts.att_context.context import draw_index\n"
        "print('DRAWS', [draw_index(3, step, [0.5, 0.25, 0.25]) for step in range(40)])"
    )
    done = run_python('-c', script)
    done.check_returncode()
    line = next(line for line in done.stdout.splitlines() if line.startswith('DRAWS'))
    module = encoder(att_context_seed=3, att_context_probs=[0.5, 0.25, 0.25])
    assert line == f"DRAWS {[CONTEXTS.index(module.draw_att_context_size(step).as_list()) for step in range(40)]}"


def test_the_draw_follows_the_probabilities():
    module = encoder(att_context_probs=[0.6, 0.3, 0.1])
    counts = Counter(module.draw_att_context_size(step).left for step in range(3000))
    for left, probability in ((4, 0.6), (8, 0.3), (-1, 0.1)):
        assert counts[left] / 3000 == pytest.approx(probability, abs=0.03)


def test_ten_equal_probabilities_are_a_distribution():
    contexts = [[left, 0] for left in range(1, 11)]
    assert encoder(contexts, att_context_probs=[0.1] * 10).att_context_probs == pytest.approx([0.1] * 10)
    with pytest.raises(ValueError, match='equal to one'):
        encoder(contexts, att_context_probs=[0.2] * 10)


def test_evaluation_and_a_single_context_draw_nothing():
    module = encoder().eval()
    assert {module.draw_att_context_size(step) for step in range(20)} == {AttContext(4, 0)}
    assert encoder([6, 0]).draw_att_context_size(3) == AttContext(6, 0)


def test_a_pinned_context_is_what_the_forward_uses_and_nothing_is_left(attended):
    module = encoder().train()
    for context in ([8, 0], (4, 0), 5, AttContext(-1, 0)):
        with module.using_att_context_size(context) as pinned:
            assert module.att_context_size == list(pinned)
            module(audio_signal=features()[0], length=features()[1])
            with module.using_att_context_size([7, 0]):
                assert module.tightest_left_context() == 7
            assert module.att_context_size == list(pinned)
    assert attended == [[8, 0], [4, 0], [5, 0], [-1, 0]]
    assert module.att_context_size == [4, 0]
    with pytest.raises(RuntimeError, match='inside'), module.using_att_context_size([8, 0]):
        raise RuntimeError('inside')
    assert module.att_context_size == [4, 0]


def test_unpinned_training_forwards_draw_by_their_own_count(attended):
    module = encoder().train()
    for _ in range(10):
        module(audio_signal=features()[0], length=features()[1])
    assert attended == [module.draw_att_context_size(step).as_list() for step in range(10)]
    assert module.att_context_size == [4, 0]


def test_the_context_decides_who_sees_a_changed_frame():
    module = encoder(n_layers=1).eval()
    signal, lengths = features(frames=160, batch=1)
    changed = signal.clone()
    changed[:, :, 40] += 10  # attention frame 10; the convolutions reach 4 frames and the subsampling 1 further
    for left in (4, 8):
        with module.using_att_context_size([left, 0]), torch.no_grad():
            before, after = module(audio_signal=signal, length=lengths), module(audio_signal=changed, length=lengths)
        seen = (before[0] != after[0]).any(dim=1)[0].nonzero().flatten().tolist()
        assert seen == list(range(10, 10 + left + 6))


def test_tightest_left_context():
    module = encoder()
    assert module.tightest_left_context() == 4
    with module.using_att_context_size([-1, 0]):
        assert module.tightest_left_context() == -1


@pytest.mark.parametrize('value', ['loud', [1, 2, 3], [-2, 0], [1.5, 0], None])
def test_no_context_is_refused_by_name(value):
    with pytest.raises(ValueError, match='encoder.att_context_size'), encoder().using_att_context_size(value):
        pass


def test_contexts_that_the_attention_cannot_follow_are_refused():
    chunked = encoder([[8, 3], [4, 1]], att_context_style='chunked_limited')
    with chunked.using_att_context_size([12, 3]):
        pass
    with (
        pytest.raises(ValueError, match=r'\[9, 3\].*multiple of the chunk, 4'),
        chunked.using_att_context_size([9, 3]),
    ):
        pass
    local = encoder([8, 8], self_attention_model='rel_pos_local_attn')
    with local.using_att_context_size([8, 8]):
        pass
    with pytest.raises(ValueError, match='rel_pos_local_attn'), local.using_att_context_size([4, 4]):
        pass


@pytest.mark.parametrize('offline', [False, True], ids=['streaming', 'offline'])
def test_one_context_gives_stocks_results_bit_for_bit(offline):
    settings = dict(causal_downsampling=False, conv_norm_type='batch_norm', conv_context_size=None) if offline else {}
    module = encoder([-1, -1] if offline else [6, 0], **settings)
    patched, lengths = module(audio_signal=features()[0], length=features()[1])
    expected = stock_forward(module)
    assert torch.equal(patched, expected[0]) and torch.equal(lengths, expected[1])


def stock_forward(module):
    """Run NeMo's own encoder class on a copy of the module's weights."""
    stock = copy.deepcopy(module)
    stock.__class__ = conformer_encoder._up.ConformerEncoder
    stock.__dict__['att_context_size'] = module.att_context_size  # where stock has it
    return stock(audio_signal=features()[0], length=features()[1])


def test_adapters_follow():
    registered = adapter_mixins.get_registered_adapter(ConformerEncoder)
    assert registered.base_class is ConformerEncoder and registered.adapter_class is ConformerEncoderAdapter
    assert issubclass(ConformerEncoderAdapter, conformer_encoder._up.ConformerEncoderAdapter)
    assert adapter_mixins.get_registered_adapter(ConformerEncoderAdapter).base_class is ConformerEncoder


def test_the_state_dict_is_stocks():
    assert not [name for name in encoder().state_dict() if 'context' in name or 'draw' in name]
