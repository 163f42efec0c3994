# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
from tiny_encoder import tiny_encoder

from nemo.collections.asr.parts.att_context import AttContext, ContextPolicy

DEFAULT, OVERRIDE, BATCH, CEILING = (AttContext(left, 0) for left in (10, 20, 30, 5))
OPTIONS = (AttContext(10, 0), AttContext(40, 0), AttContext(-1, 0))
POLICY = ContextPolicy(DEFAULT, OPTIONS, (0.25, 0.25, 0.5), seed=3)


class TestDraw:
    def test_it_is_a_pure_function_of_seed_and_step_with_the_given_shares(self):
        drawn = [POLICY.at(step) for step in range(2000)]
        assert drawn == [POLICY.at(step) for step in range(2000)]
        assert [replace(POLICY, seed=4).at(step) for step in range(2000)] != drawn
        assert drawn.count(OPTIONS[2]) == pytest.approx(1000, abs=100)

    def test_ranks_share_it_or_draw_for_themselves(self):
        own = replace(POLICY, shared=False)
        drawn = [[policy.at(step, rank) for step in range(50)] for policy in (POLICY, own) for rank in (0, 1)]
        assert drawn[0] == drawn[1] and drawn[2] != drawn[3]
        assert drawn[2:] == [[own.at(step, rank) for step in range(50)] for rank in (0, 1)]

    def test_the_ceiling_narrows_every_draw(self):
        assert {replace(POLICY, ceiling=CEILING).at(step) for step in range(20)} == {CEILING}
        assert replace(POLICY, ceiling=AttContext(-1, -1)).at(0) == POLICY.at(0)
        policy = ContextPolicy(AttContext(8, 3), style='chunked_limited', ceiling=AttContext(6, 3))
        assert policy.at(0) == AttContext(4, 3)  # in whole chunks; a curriculum's items are checked before training
        with pytest.raises(ValueError, match='^item 0: the left context is 6; .* multiple of'):
            policy.narrowed(policy.default, policy.ceiling, 'item 0')


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('active', [None, AttContext(3, 0)])
@pytest.mark.parametrize('override', [None, OVERRIDE])
@pytest.mark.parametrize('with_batch', [None, BATCH])
def test_precedence(training, active, override, with_batch):
    encoder = tiny_encoder(att_context_size=[list(context) for context in OPTIONS]).train(training)
    encoder.att_context_size = override
    encoder._active = active
    expected = active or override or with_batch or (encoder.att_context_policy.at(9) if training else DEFAULT)
    assert encoder.att_context_of_batch(with_batch, step=9) == expected
    encoder.att_context_policy = replace(encoder.att_context_policy, ceiling=AttContext(2, 0))
    assert encoder.att_context_of_batch(with_batch, step=9) == (AttContext(2, 0) if training else expected)
