# SPDX-License-Identifier: Apache-2.0
import torch

from nemo.collections.asr.parts.att_context import AttContext, LayerAttentionMasks


class TestLayerAttentionMasks:
    def test_layers_that_see_the_same_share_a_mask_and_all_are_sliced(self):
        wide, narrow = AttContext(4, 0), AttContext(1, 0)
        tensors = {wide: torch.eye(4, dtype=torch.bool).expand(2, 4, 4), narrow: torch.ones(2, 4, 4).bool()}
        masks = LayerAttentionMasks(tensors, {None: wide, AttContext(8, 0): wide, narrow: narrow})[:, 3:]
        assert masks.of(None) is masks.of(AttContext(8, 0))
        assert torch.equal(masks.of(None), tensors[wide][:, 3:])
        assert torch.equal(masks.of(narrow), tensors[narrow][:, 3:])
