# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from spies import recording_attention
from tiny_encoder import WITHOUT_DROPOUT, tiny_encoder

from nemo.collections.asr.modules import conformer_encoder
from nemo.collections.asr.parts.att_context.context import AttContext

CONTEXTS = [[4, 0], [8, 0], [-1, 0]]


def encoder(att_context_size=CONTEXTS, **kwargs):
    return tiny_encoder(**{**WITHOUT_DROPOUT, 'n_layers': 2, 'att_context_size': att_context_size, **kwargs}).train()


def features(frames=128, batch=2):
    generator = torch.Generator().manual_seed(0)
    return dict(audio_signal=torch.randn(batch, 8, frames, generator=generator), length=torch.full((batch,), frames))


@pytest.fixture
def attended():
    """The contexts that attention masks are made for."""
    with recording_attention() as contexts:
        yield contexts


def test_ten_equal_probabilities_are_a_distribution():
    contexts = [[left, 0] for left in range(1, 11)]
    assert encoder(contexts, att_context_probs=[0.1] * 10).att_context_probs == pytest.approx([0.1] * 10)
    with pytest.raises(ValueError, match='equal to one'):
        encoder(contexts, att_context_probs=[0.2] * 10)


def test_a_pinned_context_is_what_the_forward_uses_and_nothing_is_left(attended):
    module = encoder()
    for context in ([8, 0], (4, 0), 5, AttContext(-1, 0)):
        with module.using_att_context_size(context) as pinned:
            assert module.att_context_size == list(pinned)
            module(**features())
            with module.using_att_context_size([7, 0]):
                assert module.tightest_left_context() == 7
            assert module.att_context_size == list(pinned)
    assert attended == [[8, 0], [4, 0], [5, 0], [-1, 0]]
    with pytest.raises(RuntimeError, match='inside'), module.using_att_context_size([8, 0]):
        raise RuntimeError('inside')
    assert module.att_context_size == [4, 0]


def test_unpinned_training_forwards_draw_by_their_own_count(attended):
    module = encoder()
    for _ in range(10):
        module(**features())
    assert attended == [module.draw_att_context_size(step).as_list() for step in range(10)]
    assert module.att_context_size == [4, 0]


@pytest.mark.parametrize('offline', [False, True], ids=['streaming', 'offline'])
def test_one_context_gives_stocks_results_bit_for_bit(offline):
    settings = dict(causal_downsampling=False, conv_norm_type='batch_norm', conv_context_size=None) if offline else {}
    module = encoder([-1, -1] if offline else [6, 0], **settings)
    patched, stock = module(**features()), copy.deepcopy(module)
    stock.__class__ = conformer_encoder._up.ConformerEncoder
    stock.__dict__['att_context_size'] = module.att_context_size  # where stock has it
    assert all(map(torch.equal, patched, stock(**features())))
