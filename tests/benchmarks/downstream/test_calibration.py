# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny_nest import tiny_model

LENGTHS = torch.full((60,), 1600)


@pytest.fixture(scope='module')
def calibration(load):
    return load('calibration')


@pytest.fixture(scope='module')
def masks(calibration):
    """Masks in one tight context, so dense that runs of the synchronised ones are much shorter than stock's."""
    contexts, dense = ((5, 0),), 0.03
    return {
        'synchronised': calibration.Masks(contexts, True, mask_prob=dense),
        'stock': calibration.Masks(contexts, False, mask_prob=0.001),
        'stock-short': calibration.Masks(contexts, False, mask_prob=0.001),
    }


def test_shares_are_matched_and_runs_where_they_are_to_be(calibration, masks):
    found = calibration.calibrated(masks, 'synchronised', 'stock-short', LENGTHS)
    wanted = found['synchronised']
    assert wanted['mask_prob'] == 0.03 and wanted['unanswerable_share'] == 0
    for arm in ('stock', 'stock-short'):
        assert found[arm]['masked_share'] == pytest.approx(wanted['masked_share'], rel=0.01), arm
        assert found[arm]['unanswerable_share'] > 0.1, arm
    assert found['stock']['block_size'] == 40 and found['stock']['mean_run'] > 1.5 * wanted['mean_run']
    assert found['stock-short']['block_size'] < 40
    assert found['stock-short']['mean_run'] == pytest.approx(wanted['mean_run'], rel=0.1)


def test_masks_like_the_references_are_left_as_they_are(calibration, masks):
    same = {'synchronised': masks['synchronised'], 'both': masks['synchronised']}
    found = calibration.calibrated(same, 'synchronised', 'none', LENGTHS)
    assert found['both'] == found['synchronised']


@pytest.mark.parametrize('context', [[5, 0], [-1, 0]])
def test_context_free_masks_do_not_follow_the_model(load, context):
    masking_class = load('context_free_masking').ContextFreeMasking
    torch.manual_seed(0)
    model = tiny_model('model.masking.causal=false', 'model.masking.mask_prob=0.02')
    own, model.mask_processor = model.mask_processor, masking_class.of_model(model)
    assert model.mask_processor.mask_prob == 0.02 and model.mask_processor.subsampling_factor == 8
    assert torch.equal(model.mask_processor.mask_embedding, own.mask_embedding)
    model.mask_processor.followed_left_context_size = 2  # as a curriculum would say
    masks = []
    for using in (context, [10, 0]):
        torch.manual_seed(1)
        with model.using_att_context_size(using):
            masking = model._own_masking()
            assert masking.keywords == {}
            masks.append(masking(input_feats=torch.zeros(4, 80, 800), input_lengths=torch.full((4,), 800))[1])
    assert masks[0].any() and torch.equal(*masks)
