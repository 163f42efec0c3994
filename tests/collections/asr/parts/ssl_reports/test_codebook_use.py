# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from nemo.collections.asr.parts.ssl_reports.codebook_use import CodebookUse, statistics_of


def statistics(use):
    return [0] * 4 if use.counts is None else [value.item() for value in statistics_of(use.counts).values()]


def counted(*batches, num_classes=8, **arguments):
    """Count batches of one utterance each, given as lists of tokens."""
    use = CodebookUse(num_classes, **arguments)
    for batch in batches:
        use.update(torch.tensor([batch]), torch.tensor([len(batch)]))
    return use


class TestStatistics:
    @pytest.mark.parametrize(
        'tokens, expected',
        [
            ([0, 0, 1, 2], (3, 2**1.5, 0.5, 4)),  # an entropy of 1.5 bits
            ([5] * 9, (1, 1, 1, 9)),
            (list(range(8)) * 3, (8, 8, 1 / 8, 24)),
        ],
    )
    def test_by_eye(self, tokens, expected):
        assert statistics(counted(tokens)) == pytest.approx(expected)

    def test_what_padding_holds_does_not_count_be_it_no_token_at_all(self):
        use = CodebookUse(4)
        use.update(torch.tensor([[0, 1, 2, 3], [3, 3, -100, 10**9]]), torch.tensor([3, 2]))
        used, _, top_share, frames = statistics(use)
        assert (used, top_share, frames) == (4, pytest.approx(0.4), 5)

    def test_several_books_give_the_worst(self):
        use = CodebookUse(4, num_books=2)
        use.update(torch.tensor([[[0, 1], [1, 1], [2, 1], [3, 2]]]), torch.tensor([4]))
        perplexity = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
        assert statistics(use) == pytest.approx([2, perplexity, 0.75, 4])

    def test_before_the_first_batch_and_without_frames(self, warnings):
        assert statistics(CodebookUse(8)) == [0, 0, 0, 0]
        use = CodebookUse(8)
        use.update(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 0]))
        use.check()
        CodebookUse(8).check()
        assert statistics(use)[3] == 0 and not warnings

    def test_where_the_default_dtype_is_half(self):
        use = counted(torch.arange(512).tolist() * 3 + [0], num_classes=512)
        expected = statistics(use)
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert statistics(use) == expected
        finally:
            torch.set_default_dtype(torch.float32)


class TestWindow:
    def test_slides_by_blocks(self):
        """Four batches in two blocks of two: the fifth batch pushes out the first two."""
        use = counted([0], [1], [2], [3], batches_per_block=2, blocks=2)
        assert statistics(use)[3] == 4
        use.update(torch.tensor([[4]]), torch.tensor([1]))
        assert statistics(use)[0] == statistics(use)[3] == 3  # 2, 3, 4

    @pytest.mark.parametrize('per_block, blocks', [(100, 10), (2, 10), (1, 3), (1, 1)])
    def test_never_covers_more_than_its_blocks_and_all_but_one_of_them(self, per_block, blocks):
        use = CodebookUse(2, batches_per_block=per_block, blocks=blocks)
        for batch in range(1, 2 * per_block * blocks + 3):
            use.update(torch.tensor([[1]]), torch.tensor([1]))
            covered = statistics(use)[3]
            assert min(batch, per_block * (blocks - 1) + 1) <= covered <= per_block * blocks


@pytest.mark.parametrize(
    'tokens, classes, reason',
    [
        ([0, 0, 1, 2], 8, None),  # half is not above half
        ([0, 0, 0, 1, 2], 8, 'one code stands for 60% of the frames'),
        ([0, 1, 2] * 200, 512, 'under 1% of the classes (3 of 512 codes, perplexity 3.0, in 600 frames)'),
        ([0, 1, 2, 3, 4, 5] * 100, 512, None),
        ([0, 1, 2], 512, None),  # few frames cannot fill the codebook
    ],
)
@pytest.mark.parametrize('ends', ['block', 'training'])
def test_collapse(tokens, classes, reason, ends, warnings):
    use = counted(tokens, num_classes=classes, batches_per_block=1 if ends == 'block' else 100)
    if ends == 'training':
        assert not warnings
        use.check()
    assert [reason in warning for warning in warnings] == [True] * (reason is not None)
