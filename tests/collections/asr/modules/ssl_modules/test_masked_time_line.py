# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo.collections.asr.modules.ssl_modules.masking import RandomBlockMasking
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.visible_frames import masked_share_per_frame, no_visible_frame
from nemo.collections.asr.parts.att_context.windows import Window

FACTOR = 8
FRAMES = 1600
OVERLAP = dict(mask_prob=0.01, block_size=40, allow_overlap=True)
APART = dict(mask_prob=0.5, block_size=48, allow_overlap=False)


def masking_of(settings):
    return RandomBlockMasking(1, subsampling_factor=FACTOR, causal=True, **settings)


def streamed(masking, window, step, streams=64):
    """Masks of streams that come in steps of so many mask frames; [B, T] bool."""
    line, parts = masking.new_stream(streams), []
    for start in range(0, FRAMES, step):
        parts.append(masking.draw_on(line, min(step, FRAMES - start), window))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize('settings', [OVERLAP, APART], ids=['overlap', 'apart'])
@pytest.mark.parametrize('step', [8, 80, 37, 1])
@pytest.mark.parametrize(
    'context, style',
    [
        ((2, 0), 'regular'),
        ((10, 0), 'regular'),
        ((70, 0), 'regular'),
        ((-1, 0), 'regular'),
        ((4, 2), 'regular'),
        ((0, 3), 'chunked_limited'),
        ((8, 3), 'chunked_limited'),
        ((-1, 3), 'chunked_limited'),
    ],
)
def test_every_masked_frame_of_a_stream_can_be_answered(settings, step, context, style):
    torch.manual_seed(0)
    window = Window(AttContext(*context), style)
    share = masked_share_per_frame(streamed(masking_of(settings), window, step, streams=16).unsqueeze(1), FACTOR)
    assert (share > 0.8).sum() > 100
    assert no_visible_frame(share, window).sum() == 0


@pytest.mark.parametrize('settings', [OVERLAP, APART], ids=['overlap', 'apart'])
@pytest.mark.parametrize('step', [8, 80])
@pytest.mark.parametrize('context', [(5, 0), (10, 0), (20, 0), (70, 0), (-1, 0)])
def test_a_stream_is_masked_as_much_as_a_whole_utterance(settings, step, context):
    torch.manual_seed(0)
    masking, window = masking_of(settings), Window(AttContext(*context))
    offline = masking.draw(torch.full((480,), FRAMES), FRAMES, effective_window=window)
    live = streamed(masking, window, step, streams=480)
    assert live.float().mean() == pytest.approx(offline.float().mean().item(), rel=0.15)


def test_blocks_go_on_from_step_to_step():
    torch.manual_seed(0)
    masking = masking_of(dict(OVERLAP, block_size=24))
    masks = streamed(masking, Window(AttContext(-1, 0)), step=8)
    changes = torch.nn.functional.pad(masks.int(), (1, 1)).diff(dim=1)
    runs = (changes == -1).nonzero()[:, 1] - (changes == 1).nonzero()[:, 1]
    cut_off_at_the_end = masks[:, -24:].any(dim=1).sum()
    assert (runs < 24).sum() <= cut_off_at_the_end and (runs >= 24).sum() > 100


def test_nothing_is_masked_where_a_frame_sees_itself_alone_or_the_probability_is_zero():
    for settings, context in (
        (OVERLAP, (0, 0)),
        (dict(OVERLAP, mask_prob=0), (10, 0)),
        (dict(APART, mask_prob=0), (10, 0)),
    ):
        assert not streamed(masking_of(settings), Window(AttContext(*context)), step=8, streams=2).any()


@pytest.mark.parametrize('settings', [dict(OVERLAP, mask_prob=0.2), dict(APART, mask_prob=1.0)])
def test_max_mask_ratio_bounds_the_share(settings):
    torch.manual_seed(0)
    masks = streamed(masking_of(dict(settings, max_mask_ratio=0.6)), Window(AttContext(10, 0)), step=8)
    assert masks.float().mean() == pytest.approx(0.6, abs=0.03)


def test_a_call_masks_the_new_frames():
    torch.manual_seed(0)
    masking, masked = masking_of(OVERLAP), 0
    line, feats = masking.new_stream(1), torch.randn(1, 1, 40)
    for end in range(40, 400, 40):
        seen, masks = masking(feats, torch.tensor([40]), effective_left_context=10, stream=line)
        assert line.received.item() == end and masks.shape == (1, 1, 40)
        assert torch.equal(seen, torch.where(masks > 0, masking.mask_embedding.view(1, 1, 1), feats))
        masked += masks.sum()
    assert masked
