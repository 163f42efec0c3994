# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import torch

from nemo.collections.asr.modules import RandomBlockMasking
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.ssl_reports.audit import audit_masks
from nemo.collections.asr.parts.ssl_reports.fixed_masks import FixedMasks, utterance_seeds


def signals():
    audio = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9000, 5000, 700])
    return audio * (torch.arange(9000) < lengths.unsqueeze(1)), lengths


class TestUtteranceSeeds:
    def test_they_depend_on_an_utterance_and_the_seed_alone(self):
        audio, lengths = signals()
        seeds = utterance_seeds(audio, lengths, 0)
        assert len(set(seeds)) == 3 and all(0 <= seed < 2**32 for seed in seeds)
        padded = torch.nn.functional.pad(audio, (0, 123), value=7.0)
        assert utterance_seeds(padded, lengths, 0) == seeds
        for row in range(3):
            alone = audio[row : row + 1, : lengths[row]]
            assert utterance_seeds(alone, lengths[row : row + 1], 0) == [seeds[row]]
        assert not set(utterance_seeds(audio, lengths, 1)) & set(seeds)

    def test_a_sample_more_or_another_level_is_another_utterance(self):
        audio, lengths = signals()
        seeds = utterance_seeds(audio, lengths, 0)
        assert not set(utterance_seeds(audio, lengths - 1, 0)) & set(seeds)
        assert not set(utterance_seeds(audio * 0.5, lengths, 0)) & set(seeds)


class TestFixedMasks:
    SETTINGS = dict(feat_in=4, mask_prob=0.05, block_size=16, allow_overlap=True, subsampling_factor=8)

    def mask(self, masking, lengths, seeds, left=-1, calls=1):
        feats = torch.randn(len(lengths), 4, int(max(lengths)), generator=torch.Generator().manual_seed(1))
        fixed = FixedMasks(masking, seeds, Window(AttContext(left, 0)))
        for _ in range(calls):
            found = fixed(input_feats=feats, input_lengths=torch.tensor(lengths))
        return feats, *found

    def test_masks_do_not_depend_on_the_batch(self):
        masking = RandomBlockMasking(**self.SETTINGS)
        _, _, together = self.mask(masking, [400, 160, 333], [5, 6, 7], left=10)
        for row, (length, seed) in enumerate([(400, 5), (160, 6), (333, 7)]):
            _, _, alone = self.mask(masking, [length], [seed], left=10)
            assert torch.equal(together[row, :, :length], alone[0]) and not together[row, :, length:].any()
            assert alone.any()

    def test_later_calls_get_the_same(self):
        masking = RandomBlockMasking(**self.SETTINGS)
        feats, masked, masks = self.mask(masking, [400, 160], [1, 2], left=3, calls=3)
        assert torch.equal(self.mask(masking, [400, 160], [1, 2], left=3)[2], masks)
        embedding = masking.mask_embedding.view(1, -1, 1)
        assert torch.equal(masked, torch.where(masks > 0, embedding, feats))
        windows = {'tight': Window(AttContext(3, 0))}
        audit = audit_masks(masks, torch.tensor([400, 160]), 8, windows)
        assert audit.frames_masked > 0 and audit.no_visible_frame['tight'] == 0

    def test_generators_and_module_are_left_as_they_were(self):
        masking = RandomBlockMasking(**self.SETTINGS)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        self.mask(masking, [400], [1])
        assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])
        assert 'forward' not in vars(masking)

    def test_a_module_that_knows_no_context_and_uses_pythons_generator(self):
        class Own(torch.nn.Module):
            def forward(self, input_feats, input_lengths):
                start = random.randrange(input_feats.shape[-1])
                masks = torch.zeros_like(input_feats)
                masks[..., start : start + 5] = 1
                return input_feats * (1 - masks), masks

        _, _, first = self.mask(Own(), [90, 90, 90], [1, 2, 1], left=4)
        assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
