# SPDX-License-Identifier: Apache-2.0
"""Codebooks that move to where the frames are."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_two_ranks

from nemo.collections.asr.modules.ssl_modules.codebook_refinement import DEAD_SHARE, CodebookRefinement
from nemo.collections.asr.modules.ssl_modules.quantizers import RandomProjectionVectorQuantizer

REFINE = dict(every_n_steps=3, until_step=9, decay=0.5)


def unit(*rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float64), dim=-1)


def build(refine=REFINE, **changed):
    arguments = dict(feat_in=6, code_dim=4, num_classes=20, num_books=2, dist_fn='l2', combine_time_steps=2)
    torch.manual_seed(0)
    return RandomProjectionVectorQuantizer(**{**arguments, **changed}, refine=refine)


def batch_of(step, batch=3, dtype=torch.float32):
    """Features whose direction is far from even, so that some codes have no frame; and lengths in targets."""
    signal = torch.randn(batch, 6, 30, generator=torch.Generator().manual_seed(step), dtype=dtype) + 1
    return signal, torch.tensor([15, 11, 0])[:batch]


def observe(quantizer, signal, lengths):
    quantizer.observe(signal, lengths, quantizer(input_signal=signal)[1])


def train(quantizer, steps):
    """Go through training steps; return what each refinement logs."""
    logs = []
    for step in steps:
        logs.append({name: value.item() for name, value in quantizer.refine_if_due(step).items()})
        observe(quantizer, *batch_of(step))
    return logs


class TestRefinement:
    def test_equal_frames_are_not_split(self):
        refinement = CodebookRefinement(1, 2, 2, dict(every_n_steps=1, until_step=5))
        vectors = F.normalize(torch.tensor([0.3, 0.7]), dim=0).expand(100, 1, 2)
        refinement.observe(vectors, torch.zeros(100, 1, dtype=torch.int64), torch.ones(100, dtype=torch.bool))
        codes, replaced = refinement.refine(unit([1, 0], [-1, 0]).unsqueeze(0), step=1)
        assert replaced == 0
        torch.testing.assert_close(codes[0], unit([0.3, 0.7], [-1, 0]))

    def test_padding_silence_and_what_is_no_number_add_nothing(self):
        refinement = CodebookRefinement(1, 2, 2, dict(every_n_steps=1, until_step=5))
        vectors = torch.tensor([[1.0, 0], [0, 1], [0, 0], [float('nan'), 1], [float('inf'), 0]]).unsqueeze(1)
        counted = torch.tensor([True, False, True, True, True])
        refinement.observe(vectors, torch.zeros(5, 1, dtype=torch.int64), counted)
        assert refinement.observed[0].tolist() == [[2**32, 0, 1], [0, 0, 0]]

    def test_equals_a_plain_loop(self):
        quantizer = build()
        codebooks, sums, counts = quantizer.codebooks.numpy().copy(), np.zeros((2, 20, 4)), np.zeros((2, 20))
        replaced = 0
        for step in range(12):
            logs = quantizer.refine_if_due(step)
            if step in (3, 6, 9):
                assert set(logs) == {'codebook/changed_share', 'codebook/replaced_codes'}
                found = [refined_by_a_loop(*book) for book in zip(codebooks, sums, counts)]
                codebooks, sums, counts = (np.stack([book[part] for book in found]) for part in range(3))
                assert logs['codebook/replaced_codes'] == sum(book[3] for book in found)
                replaced += sum(book[3] for book in found)
                np.testing.assert_allclose(quantizer.codebooks.numpy(), codebooks, rtol=0, atol=1e-7)
            else:
                assert logs == {}
            signal, lengths = batch_of(step)
            observe(quantizer, signal, lengths)
            frames, tokens = quantizer._unit_vectors(signal).numpy(), quantizer(input_signal=signal)[1].numpy()
            for row, length in enumerate(lengths):
                for frame in range(length):
                    for book in range(2):
                        sums[book, tokens[row, frame, book]] += frames[row, frame, book]
                        counts[book, tokens[row, frame, book]] += 1
        assert replaced > 0  # or nothing is shown of it

    def test_the_share_of_changed_tokens_is_that_of_the_last_batch(self):
        quantizer = build()
        train(quantizer, range(3))
        signal, lengths = batch_of(2)
        before = quantizer(input_signal=signal)[1]
        share = quantizer.refine_if_due(3)['codebook/changed_share']
        changed = before != quantizer(input_signal=signal)[1]
        assert share == pytest.approx((changed[0].sum() + changed[1, :11].sum()).item() / (2 * 26)) and share > 0


def refined_by_a_loop(codebook, sums, counts):
    """Refine a codebook [C, K] code by code; return it, the sums and counts to go on with, and the codes replaced."""
    before, codes, sums, counts = codebook, codebook.copy(), sums.copy(), counts.copy()
    for code in range(len(codes)):
        if counts[code] > 0:
            codes[code] = sums[code] / np.linalg.norm(sums[code])
    order, mean, replaced = np.argsort(counts, kind='stable'), counts.mean(), 0
    for dead, large in zip(order[: len(order) // 2], order[::-1]):
        if counts[dead] < DEAD_SHARE * mean and counts[large] > max(mean, 1):
            length, parent = np.linalg.norm(sums[large]), codes[large].copy()
            spread = np.sqrt((1 - (length / counts[large]) ** 2) / (codes.shape[1] - 1))
            aside = before[dead] - before[dead] @ parent * parent
            counts[large] /= 2
            counts[dead] = counts[large]
            for code, sign in ((dead, 1), (large, -1)):
                half = parent + sign * spread * aside / np.linalg.norm(aside)
                codes[code] = half / np.linalg.norm(half)
                sums[code] = codes[code] * length / 2
            replaced += 1
    return codes, sums * REFINE['decay'], counts * REFINE['decay'], replaced


class TestSteps:
    def test_every_n_steps_until_a_step_and_not_at_the_start(self):
        logs = train(build(), range(20))
        assert [step for step, said in enumerate(logs) if said] == [3, 6, 9]

    def test_a_step_that_comes_again_refines_once(self):
        logs = train(build(), [0, 0, 3, 3, 3, 4, 6, 6])
        assert [bool(said) for said in logs] == [False, False, True, False, False, False, True, False]

    @pytest.mark.parametrize('until_step', [9, 11])
    def test_nothing_is_observed_once_no_refinement_is_to_come(self, until_step):
        quantizer = build(dict(REFINE, until_step=until_step))
        train(quantizer, range(9))
        assert quantizer.refinement.observed.any()
        train(quantizer, range(9, 14))
        assert not quantizer.refinement.observed.any() and quantizer.refinement.last_batch is None

    def test_codebooks_that_are_trained_are_refused(self):
        with pytest.raises(
            ValueError, match='^model.quantizer.freeze is false; with model.quantizer.refine it must be true'
        ):
            build(freeze=False)


class TestCheckpoints:
    @pytest.mark.parametrize('stop', [1, 3, 4, 6, 8, 9, 10])
    def test_a_resumed_run_goes_on_to_the_digit(self, stop):
        whole, stopped = build(), build()
        logs = train(whole, range(12))
        train(stopped, range(stop))
        resumed = build()
        resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
        rest = train(resumed, range(stop, 12))
        assert whole.state_dict().keys() == resumed.state_dict().keys()
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
        shares = [[said.pop('codebook/changed_share', None) for said in part] for part in (rest, logs[stop:])]
        assert rest == logs[stop:] and shares[0][1:] == shares[1][1:]  # the first has no batch from before

    def test_a_checkpoint_without_a_refinement_starts_one_afresh(self):
        plain, refined = build(None), build()
        train(refined, range(5))
        assert not any('refinement' in name for name in plain.state_dict())
        refined.load_state_dict(plain.state_dict())
        assert torch.equal(refined.codebooks, plain.codebooks)
        assert not any(value.any() for value in refined.refinement.state_dict().values())
        assert refined.refine_if_due(3)
        plain.load_state_dict(refined.state_dict())
        assert torch.equal(refined.codebooks, plain.codebooks)
        assert not any('refinement' in name for name in plain.state_dict())


@pytest.mark.integration
def test_two_ranks_find_what_one_finds_alone_to_the_digit(tmp_path):
    first, second = run_on_two_ranks(Path(__file__).with_name('refinement_run.py'), tmp_path)
    assert first['alone']['state'] == first['together']['state'] == second['together']['state']
    replaced = [[said.get('codebook/replaced_codes') for said in rank['together']['logs']] for rank in (first, second)]
    assert replaced[0] == replaced[1] and sum(filter(None, replaced[0])) > 0
