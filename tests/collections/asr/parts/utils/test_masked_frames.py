# SPDX-License-Identifier: Apache-2.0
"""That a model decodes no other frames is tested in ``test_ssl_models_masked_decoding.py``."""

import pytest
import torch

from nemo.collections.asr.parts.utils.masked_frames import select_counted


def test_the_frames_that_count_with_their_targets_and_utterances():
    frames, targets = torch.arange(12.0).view(2, 3, 2), torch.arange(6).view(2, 3)
    counted = torch.tensor([[False, True, False], [True, False, True]])
    chosen, aims, utterances = select_counted(frames, targets, counted)
    assert chosen.tolist() == [[2, 3], [6, 7], [10, 11]]
    assert aims.tolist() == [1, 3, 5] and utterances.tolist() == [0, 1, 1]


@pytest.mark.parametrize('books', [(), (2,)])
def test_where_none_counts_there_is_one_with_no_target(books):
    counted = torch.zeros(2, 3, dtype=torch.bool)
    chosen, aims, utterances = select_counted(torch.ones(2, 3, 4), torch.ones(2, 3, *books).long(), counted)
    assert chosen.shape == (1, 4) and (aims == -100).all() and aims.shape == (1, *books) and utterances.tolist() == [0]
