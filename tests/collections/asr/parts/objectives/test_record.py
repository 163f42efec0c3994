# SPDX-License-Identifier: Apache-2.0
import torch

from nemo.collections.asr.parts.objectives.record import BatchRecord


def record(masks, factor):
    of_one = torch.tensor([masks.shape[2]])
    return BatchRecord(
        encoded=torch.zeros(1, 16, 2),
        encoded_lengths=torch.tensor([2]),
        masks=masks,
        mask_lengths=of_one,
        tokens=torch.zeros(1, 2, dtype=torch.int64),
        token_lengths=torch.tensor([2]),
        features=torch.zeros(1, 8, masks.shape[2]),
        feature_lengths=of_one,
        factor=factor,
        threshold=0.8,
        decoder_offset=1,
    )


def test_the_masked_share_is_that_of_each_attention_frame():
    masks = torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 0, 1]).expand(1, 8, 9)  # two attention frames and a rest
    assert record(masks, factor=4).masked_share().tolist() == [[1.0, 0.25]]
    assert torch.equal(record(masks, factor=1).masked_share(), masks[:, 0])


def test_what_is_kept_has_no_graph():
    whole = record(torch.zeros(1, 8, 8), factor=4)
    kept = whole.to_keep()
    assert kept.encoded is None and whole.encoded is not None
    assert kept.masks is whole.masks and kept._replace(encoded=whole.encoded) == whole
