# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.policy import FULL, ContextPolicy, ContextSampler
from nemo.collections.asr.parts.att_context.windows import Window, tightest_window

SECTION = {'full_prob': 0.4, 'chunk_size': [1, 25], 'left_chunks': [5, 70], 'left_limited_prob': 0.75}
KEY = 'model.encoder.att_context_sampler'
FRAMES = range(60)
FIRST_DRAWS = [[165, 14], [-1, -1], [-1, 0], [-1, -1], [741, 18], [-1, -1]]  # seed 0

probabilities = st.floats(0, 1)
sides = st.integers(-1, 40)
chunks = st.integers(1, 12)


@st.composite
def samplers(draw):
    low, fewest = draw(chunks), draw(st.integers(1, 8))
    high, most = draw(st.integers(low, 30)), draw(st.integers(fewest, 50))
    return ContextSampler(draw(probabilities), (low, high), (fewest, most), draw(probabilities))


def seen(window: Window, frame: int) -> set[int]:
    return {key for key in FRAMES if window.sees(frame, key)}


def policy(sampler=None) -> ContextPolicy:
    return ContextPolicy(FULL, sampler=sampler or ContextSampler.parse(SECTION), style='chunked_limited')


class TestDraw:
    @given(samplers(), st.integers(0, 2**40), st.integers(0, 10**7))
    def test_it_is_a_pure_function_within_the_bounds(self, sampler, seed, step):
        context = sampler.draw(seed, step)
        assert context == sampler.draw(seed, step) and sampler.covers(context)
        assert context in sampler.widest_contexts() or context.left >= 0
        if context == FULL:
            return
        chunk = context.right + 1
        assert sampler.chunk_size[0] <= chunk <= sampler.chunk_size[1]
        if context.left != -1:
            assert context.left % chunk == 0
            assert sampler.left_chunks[0] <= context.left // chunk <= sampler.left_chunks[1]

    def test_the_shares_are_those_of_the_config(self):
        sampler, steps = ContextSampler.parse({**SECTION, 'chunk_size': [1, 4], 'left_chunks': [5, 6]}), 20000
        drawn = Counter(sampler.draw(0, step) for step in range(steps))
        assert drawn[FULL] / steps == pytest.approx(0.4, abs=0.015)
        for chunk in (1, 2, 3, 4):
            assert drawn[AttContext(-1, chunk - 1)] / steps == pytest.approx(0.6 * 0.25 / 4, abs=0.006)
            for left in (5, 6):
                share = drawn[AttContext(left * chunk, chunk - 1)] / steps
                assert share == pytest.approx(0.6 * 0.75 / 4 / 2, abs=0.006)

    def test_the_first_draws_stay_what_they_are(self):
        sampler = ContextSampler.parse(SECTION)
        first = [sampler.draw(0, step).as_list() for step in range(6)]
        assert first == FIRST_DRAWS  # a resumed run would go on otherwise than it began
        assert first != [sampler.draw(1, step).as_list() for step in range(6)]

    def test_few_names_cover_all(self):
        sampler = ContextSampler.parse(SECTION)
        names = {policy(sampler).label(sampler.draw(0, step)) for step in range(500)}
        groups = {'chunk_1', 'chunk_2_to_3', 'chunk_4_to_7', 'chunk_8_to_15', 'chunk_16_to_31'}
        assert names == {'unlimited_unlimited', *groups}


class TestParse:
    @pytest.mark.parametrize(
        'change, message',
        [
            ({'chunk_size': [0, 4]}, r'\.chunk_size is \[0, 4\]; it must be \[low, high\] in attention frames'),
            ({'left_chunks': [-1, 4]}, r'\.left_chunks is \[-1, 4\]; it must be null or \[low, high\] in chunks'),
            ({'left_chunks': [0, 4]}, r'\.left_chunks is \[0, 4\]; .* \.?model.*chunk_size from 2 on'),
            ({'full_prob': 1.5}, r'\.full_prob is 1.5; it must be a number from 0 to 1'),
            ({'left_limited_prob': '0.5'}, r"\.left_limited_prob is '0.5'"),
            ({'left_limited_prob': 0.0}, r'\.left_chunks is \[5, 70\] and .*\.left_limited_prob is 0'),
            ({'chunk_sise': [1, 2]}, r'\.chunk_sise is not known; did you mean .*\.chunk_size'),
        ],
    )
    def test_an_error_names_the_key_the_value_and_what_is_allowed(self, change, message):
        assert ContextSampler.parse(OmegaConf.create(SECTION)) == ContextSampler(0.4, (1, 25), (5, 70), 0.75)
        with pytest.raises(ValueError, match='^' + KEY.replace('.', r'\.') + message):
            ContextSampler.parse({**SECTION, **change})

    @pytest.mark.parametrize('style', ['regular', 'chunked_limited_with_rc'])
    def test_a_style_without_chunks_is_refused(self, style):
        with pytest.raises(
            ValueError, match=f"att_context_style is '{style}', which has no chunks; use chunked_limited"
        ):
            ContextSampler.parse(SECTION, style)


@pytest.mark.parametrize(
    'contexts, can_be_drawn',
    [
        ([(70, 13), (70, 6), (70, 1), (70, 0), (-1, -1), (-1, 24), (1750, 24)], True),  # those of NVIDIA's models
        ([(70, 25), (71, 13), (56, 13), (71, 0), (70, -1)], False),
    ],
)
def test_which_contexts_can_be_drawn(contexts, can_be_drawn):
    sampler = ContextSampler.parse(SECTION)
    assert [sampler.covers(AttContext(*context)) for context in contexts] == [can_be_drawn] * len(contexts)


class TestWithinACeiling:
    @pytest.mark.parametrize(
        'context, ceiling, expected',
        [
            ((70, 13), (40, 13), (28, 13)),  # whole chunks of 14
            ((70, 13), (40, 4), (40, 4)),  # the chunk is cut to 5 frames
            ((70, 13), (40, 0), (40, 0)),
            ((-1, -1), (40, 4), (40, 4)),
            ((-1, -1), (40, -1), (40, -1)),  # no chunks
            ((70, 13), (7, -1), (0, 13)),  # its chunk alone
            ((70, 13), (-1, -1), (70, 13)),
        ],
    )
    def test_chunks_are_cut_and_the_past_is_rounded_down(self, context, ceiling, expected):
        assert policy().narrowed(AttContext(*context), AttContext(*ceiling)) == AttContext(*expected)

    @given(samplers(), st.integers(0, 100), sides, sides)
    def test_it_never_widens_and_any_ceiling_is_followed(self, sampler, step, left, right):
        drawn, ceiling = sampler.draw(0, step), AttContext(left, right)
        found = policy(sampler).narrowed(drawn, ceiling)
        assert found.intersect(drawn) == found.intersect(ceiling) == found
        assert Window(found, 'chunked_limited').in_whole_chunks().context == found


class TestLayers:
    @pytest.mark.parametrize(
        'batch, own, expected',
        [
            ((70, 13), (40, -1), (28, 13)),  # whole chunks of the batch's
            ((70, 13), (40, 0), (40, 0)),  # or of its own, smaller ones
            ((70, 13), (20, 6), (14, 6)),
            ((70, 13), (10, -1), (0, 13)),  # its chunk alone
            ((-1, -1), (40, -1), (40, -1)),
            ((28, 13), (40, 0), (28, 0)),
        ],
    )
    def test_the_past_is_rounded_down(self, batch, own, expected):
        assert policy().within(AttContext(*batch), AttContext(*own), 'here') == AttContext(*expected)

    @given(samplers(), st.integers(0, 100), sides, sides)
    def test_a_layer_sees_nothing_beyond_its_batch(self, sampler, step, left, right):
        batch = sampler.draw(0, step)
        try:
            found = policy(sampler).within(batch, AttContext(left, right), 'here')
        except ValueError as error:
            assert str(error).startswith('here, with att_context_sampler')
            return
        narrow, whole = (Window(context, 'chunked_limited') for context in (found, batch))
        assert all(seen(narrow, frame) <= seen(whole, frame) for frame in FRAMES)

    def test_layers_that_differ_leave_something_to_mask_in_every_batch(self):
        """In chunks of 14 the first sees its own chunk alone, and the second the past alone."""
        layers = AttContext(10, -1), AttContext(40, 0)
        for step in range(200):
            batch = policy().at(step)
            if batch.right == 0:
                continue
            contexts = [policy().within(batch, own, 'here') for own in layers]
            found = tightest_window(Window(context, 'chunked_limited') for context in contexts)
            assert found.sees_other_frames, batch

    def test_chunks_across_those_of_the_batch_are_refused(self):
        with pytest.raises(ValueError, match='here, with att_context_sampler.*: the right context is 3'):
            policy().within(AttContext(70, 13), AttContext(40, 3), 'here')
