# SPDX-License-Identifier: Apache-2.0
"""Which frames are hidden: the invariants of block masking, and stock's distribution where they leave room.

Shapes: B batch, D features, T mask frames, A attention frames (T / factor, rounded up).
"""

import math
from itertools import cycle

import pytest
import torch
from attention_windows import attended
from hypothesis import given, settings
from hypothesis import strategies as st

import nemo.collections.asr.modules.ssl_modules.masking as patched
from nemo.collections.asr.modules.ssl_modules.masking import ConvFeatureMaksingWrapper, RandomBlockMasking
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.visible_frames import masked_share_per_frame, no_visible_frame
from nemo.collections.asr.parts.att_context.windows import Window

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MASKED = 0.8  # an attention frame counts as masked above this share of its mask frames


def features(batch, dimension, frames, dtype=torch.float32):
    return torch.randn(batch, dimension, frames, generator=torch.Generator().manual_seed(0)).to(dtype)


def time_mask(module, lengths, frames=None, **arguments):
    """Mask zeros; returns which frames are masked, [B, T] bool."""
    lengths = torch.as_tensor(lengths)
    frames = int(lengths.max()) if frames is None else frames
    return module(torch.zeros(len(lengths), 1, frames), lengths, **arguments)[1][:, 0].bool()


def attention_frames(mask, factor):
    """Split one utterance's mask [T] into lists of mask frames, the last one perhaps shorter."""
    return [mask[start : start + factor] for start in range(0, len(mask), factor)]


def count_unanswerable(mask, factor, left):
    """Count, frame by frame, the masked attention frames without another, wholly unmasked one in their window."""
    frames = attention_frames(mask, factor)
    count = 0
    for index, frame in enumerate(frames):
        if sum(frame) / factor > MASKED:
            start = 0 if left < 0 else max(0, index - left)
            count += not any(sum(frames[other]) == 0 for other in range(start, index))
    return count


def stock_count(frames, mask_prob, block_size, allow_overlap, max_mask_ratio):
    """Draw as NeMo 2.5.3 does, from its description; returns how many frames of an utterance it masks."""
    if block_size >= frames * max_mask_ratio:
        return min(8, frames)
    if allow_overlap:
        reach = torch.full((frames,), -1)
        starts = torch.arange(frames - block_size)
        starts = starts[torch.rand(len(starts)) < mask_prob]
        reach[starts] = starts + block_size
        return int((reach.cummax(dim=0).values > torch.arange(frames)).sum())
    blocks = math.ceil(frames * mask_prob / block_size)
    if (blocks + 1) * block_size > frames:
        block_size = frames // (blocks + 1)
    return min(blocks, frames // block_size - 1) * block_size


def stock_share(frames, *arguments, repeats=200):
    return sum(stock_count(frames, *arguments) for _ in range(repeats)) / repeats / frames


settings_of_masking = st.fixed_dictionaries(
    dict(
        mask_prob=st.sampled_from([0.0, 1e-6, 0.01, 0.05, 0.3, 0.5, 0.9, 1.0]),
        block_size=st.sampled_from([1, 2, 3, 6, 8, 10, 40, 48, 200]),
        allow_overlap=st.booleans(),
        max_mask_ratio=st.sampled_from([0.0, 0.1, 0.5, 0.8, 1.0]),
        causal=st.booleans(),
        left_context_size=st.one_of(st.sampled_from([-1, 0, 1, 2, 3, 5]), st.integers(1, 400)),
        subsampling_factor=st.sampled_from([1, 4, 8]),
    )
)
lengths_of_batch = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=5)


class TestInvariants:
    @settings(max_examples=120)
    @given(
        settings_of_masking,
        lengths_of_batch,
        st.integers(0, 20),
        st.sampled_from([1, 3]),
        st.sampled_from(DTYPES),
        st.booleans(),
        st.integers(0, 1000),
    )
    def test_tensors(self, arguments, lengths, padding, dimension, dtype, forward_causal, seed):
        torch.manual_seed(seed)
        module = RandomBlockMasking(dimension, **arguments)
        x = features(len(lengths), dimension, max(lengths) + padding, dtype)
        before = x.clone()
        masked, masks = (module.forward_causal if forward_causal else module)(x, torch.tensor(lengths))
        assert masked.dtype == masks.dtype == dtype and masked.shape == masks.shape == x.shape
        assert torch.equal(x, before)
        hidden = masks.bool()
        assert torch.equal(hidden.to(dtype), masks) and torch.equal(masks, masks[:, :1].expand_as(masks))
        embedding = module.mask_embedding.to(dtype).view(1, -1, 1).expand_as(x)
        assert torch.equal(masked[hidden], embedding[hidden]) and torch.equal(masked[~hidden], x[~hidden])
        for mask, length in zip(hidden[:, 0], lengths):
            assert not mask[length:].any()

    @settings(max_examples=400)
    @given(settings_of_masking, lengths_of_batch, st.integers(0, 20), st.booleans(), st.integers(0, 1000))
    def test_whole_utterance(self, arguments, lengths, padding, forward_causal, seed):
        """Answerable, never a whole utterance, never much beyond max_mask_ratio."""
        torch.manual_seed(seed)
        module = RandomBlockMasking(1, **arguments)
        factor, left = module.subsampling_factor, module.left_context_size
        frames = max(lengths) + padding
        x = torch.zeros(len(lengths), 1, frames)
        masks = (module.forward_causal if forward_causal else module)(x, torch.tensor(lengths))[1][:, 0].tolist()
        for mask, length in zip(masks, lengths):
            assert sum(mask) <= module.max_mask_ratio * length + module.block_size
            assert sum(mask) < length or length <= factor
            shares = [sum(frame) / factor for frame in attention_frames(mask[:length], factor)]
            if len(shares) >= 2:
                assert min(shares) <= MASKED
            if length >= 2 * factor:  # also where the encoder drops the remainder
                assert min(shares[: length // factor]) <= MASKED
            if module.causal or forward_causal or left >= 0:
                assert count_unanswerable(mask[:length], factor, left) == 0

    @settings(max_examples=300)
    @given(settings_of_masking, lengths_of_batch, st.data())
    def test_windows_that_look_ahead(self, arguments, lengths, data):
        """Whatever the style and the context, every masked frame sees one with nothing masked, within the utterance."""
        style = data.draw(st.sampled_from(['regular', 'chunked_limited']))
        right = data.draw(st.integers(0, 5))
        left = data.draw(st.integers(0, 12))
        left = left if style == 'regular' else left // (right + 1) * (right + 1)
        torch.manual_seed(data.draw(st.integers(0, 1000)))
        module, window = RandomBlockMasking(1, **arguments), Window(AttContext(left, right), style)
        factor = module.subsampling_factor
        masks = time_mask(module, lengths, effective_window=window).tolist()
        for mask, length in zip(masks, lengths):
            assert sum(mask) <= module.max_mask_ratio * length + module.block_size
            assert sum(mask) < length or length < 2 * factor
            whole = attention_frames(mask[: length // factor * factor], factor)
            clean = torch.tensor([sum(frame) == 0 for frame in whole], dtype=torch.bool)
            sees = attended((left, right), style, len(whole)) & clean
            for frame, seen in zip(whole, sees):
                assert sum(frame) / factor <= MASKED or seen.any()

    @settings(max_examples=200)
    @given(settings_of_masking, lengths_of_batch, st.data())
    def test_current_frame(self, arguments, lengths, data):
        """Only the window's mask frames, [c - L * factor, c), may be masked, and of these not much too many."""
        received = data.draw(
            st.one_of(
                st.integers(0, 350),
                st.lists(st.integers(0, 350), min_size=len(lengths), max_size=len(lengths)),
            )
        )
        override = data.draw(st.sampled_from([None, -1, 0, 1, 2, 5, 30]))
        torch.manual_seed(data.draw(st.integers(0, 1000)))
        module = RandomBlockMasking(1, **arguments)
        left = module.left_context_size if override is None else override
        each = [received] * len(lengths) if isinstance(received, int) else received
        received = received if isinstance(received, int) else torch.tensor(received)
        call = module.forward_causal if data.draw(st.booleans()) else module
        _, masks = call(torch.zeros(len(lengths), 1, max(lengths)), torch.tensor(lengths), received, override)
        for mask, length, current in zip(masks[:, 0].tolist(), lengths, each):
            first = 0 if left < 0 else max(0, current - left * module.subsampling_factor)
            last = min(current, length)
            assert not any(mask[:first]) and not any(mask[last:])
            available = max(0, last - first)
            assert sum(mask) <= module.max_mask_ratio * available + module.block_size
            assert sum(mask) < length or length <= module.subsampling_factor


class TestAcceptance:
    """480 utterances of 16 s, at contexts that bite."""

    @pytest.mark.parametrize(
        'mask_prob, block_size, allow_overlap, stock', [(0.01, 40, True, 0.33), (0.5, 48, False, 0.51)]
    )
    @pytest.mark.parametrize(
        'context, style',
        [
            *(((left, 0), 'regular') for left in (5, 10, 20, 40, 80)),
            ((0, 8), 'regular'),
            ((4, 4), 'regular'),
            *((context, 'chunked_limited') for context in ((0, 3), (8, 3), (70, 13), (70, 6), (70, 1), (70, 0))),
        ],
    )
    def test_no_frame_without_a_visible_one_and_stocks_share(
        self, context, style, mask_prob, block_size, allow_overlap, stock
    ):
        torch.manual_seed(0)
        module = RandomBlockMasking(1, mask_prob, block_size, allow_overlap=allow_overlap, subsampling_factor=8)
        masks = time_mask(module, [1600] * 480, effective_window=Window(AttContext(*context), style))
        counts = masks.unflatten(1, (200, 8)).sum(dim=2)
        visible = ((counts == 0).float() @ attended(context, style, 200).float().t()) > 0
        assert (counts > 0.8 * 8).sum() > 1000
        assert ((counts > 0.8 * 8) & ~visible).sum() == 0
        assert masks.float().mean() == pytest.approx(stock, rel=0.1)

    def test_stock_leaves_frames_that_cannot_be_answered(self):
        torch.manual_seed(0)
        stock = patched._up.RandomBlockMasking(1, 0.5, 48, allow_overlap=False)
        _, masks = stock(torch.zeros(8, 1, 1600), torch.full((8,), 1600))
        assert sum(count_unanswerable(mask, 8, 5) for mask in masks[:, 0].tolist()) > 100


STOCK_SETTINGS = [  # mask_prob, block_size, allow_overlap
    (0.01, 40, True),
    (0.05, 40, True),
    (0.02, 4, True),
    (0.2, 6, True),
    (0.5, 48, False),
    (0.2, 10, False),
    (0.8, 48, False),
    (0.1, 1, False),
]


class TestStock:
    @pytest.mark.parametrize('mask_prob, block_size, allow_overlap', STOCK_SETTINGS)
    @pytest.mark.parametrize('frames', [9, 16, 40, 55, 79, 150, 1000])
    def test_share(self, frames, mask_prob, block_size, allow_overlap):
        """Within 10 % of stock 2.5.3, but for what the invariants take: guards, max_mask_ratio, whole utterances."""
        torch.manual_seed(frames)
        stock = stock_share(frames, mask_prob, block_size, allow_overlap, 0.8)
        most = 0.8 + block_size / frames
        for left, causal, factor in [(-1, False, 1), (-1, True, 8), (3, False, 1), (5, True, 8), (40, False, 8)]:
            module = RandomBlockMasking(1, mask_prob, block_size, None, True, allow_overlap, 0.8, causal, left, factor)
            share = time_mask(module, [frames] * 200, frames + 7).float().mean().item() * (frames + 7) / frames
            guarded = 0.0
            if left >= 0:
                guarded = (1 + (math.ceil(frames / factor) - 1) / (left + 1)) * factor / frames
            elif causal:
                guarded = factor / frames
            room = min(most, 1 - guarded)
            unsteady = 3 * (block_size / frames * stock / 200) ** 0.5  # of two means over 200 utterances
            near_the_edge = 0.9 if stock > 0.85 * room else 1.0  # blocks of whole frames do not fill any room
            lowest = min(0.9 * stock, max(0.0, 0.9 * room * near_the_edge))
            assert lowest - unsteady - 0.5 / frames <= share <= 1.1 * stock + unsteady, (left, causal, factor)

    @pytest.mark.parametrize('mask_prob, block_size, allow_overlap', STOCK_SETTINGS)
    def test_lengths_of_runs(self, mask_prob, block_size, allow_overlap):
        """Without a context, runs of masked frames are as long as stock's (Kolmogorov-Smirnov distance)."""
        torch.manual_seed(1)
        arguments = 1, mask_prob, block_size, None, True, allow_overlap
        ours, stock = (
            runs(time_mask(module, [600] * 300))
            for module in (RandomBlockMasking(*arguments), patched._up.RandomBlockMasking(*arguments))
        )
        assert len(ours) == pytest.approx(len(stock), rel=0.15)
        assert ours.mean().item() == pytest.approx(stock.mean().item(), rel=0.12)
        length = torch.arange(600.0)
        shares = [(each.unsqueeze(1) <= length).float().mean(dim=0) for each in (ours, stock)]
        assert (shares[0] - shares[1]).abs().max() < 0.12

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    def test_share_where_the_default_dtype_is_half(self, dtype):
        """Lightning's true half precision sets the default dtype, which torch.rand follows."""
        torch.manual_seed(0)
        module = RandomBlockMasking(1, 0.01, 40, allow_overlap=True, left_context_size=80)
        torch.set_default_dtype(dtype)
        try:
            masked = time_mask(module, [1600] * 100).sum().item()
        finally:
            torch.set_default_dtype(torch.float32)
        assert masked / 160000 == pytest.approx(0.33, rel=0.07)

    def test_blocks_of_a_short_utterance_keep_their_length(self):
        """60 frames, blocks of 40: stock starts them in the first 20, and never makes shorter ones."""
        torch.manual_seed(0)
        lengths = runs(time_mask(RandomBlockMasking(1, 0.02, 40, allow_overlap=True), [60] * 100))
        assert lengths.min() == 40 and lengths.max() <= 59

    @pytest.mark.parametrize('allow_overlap', [True, False])
    @pytest.mark.parametrize('left', [-1, 5])
    def test_a_short_utterance_is_masked_on_one_whole_attention_frame(self, allow_overlap, left):
        module = RandomBlockMasking(
            1, 0.01, 40, allow_overlap=allow_overlap, left_context_size=left, subsampling_factor=8
        )
        for frames in (24, 33, 48):
            masks = time_mask(module, [frames] * 50)
            whole = masks[:, : frames // 8 * 8].unflatten(1, (-1, 8)).all(dim=2)
            assert (whole.sum(dim=1) == 1).all() and (masks.sum(dim=1) == 8).all()

    def test_constructor_positions_and_state_dict(self):
        arguments = (5, 0.4, 7, 0.25, False, True, 0.6)
        module, stock = RandomBlockMasking(*arguments), patched._up.RandomBlockMasking(*arguments)
        assert isinstance(module, patched._up.RandomBlockMasking)
        assert module.state_dict().keys() == stock.state_dict().keys() == {'mask_embedding'}
        for name in ('mask_prob', 'block_size', 'allow_overlap', 'max_mask_ratio'):
            assert getattr(module, name) == getattr(stock, name)
        assert torch.equal(module.mask_embedding, torch.full((5,), 0.25))
        module.load_state_dict(stock.state_dict())

    def test_without_following_the_context_masks_are_those_of_an_unlimited_one(self):
        arguments = 1, 0.05, 10, None, True, True, 0.8
        follows = RandomBlockMasking(*arguments, causal=True, left_context_size=3)
        ignores = RandomBlockMasking(*arguments, causal=True, left_context_size=3, follow_context=False)
        masks = []
        for module in (RandomBlockMasking(*arguments), follows, ignores):
            torch.manual_seed(0)
            masks.append(time_mask(module, [300] * 8))
        assert torch.equal(masks[2], masks[0]) and not torch.equal(masks[1], masks[0])
        assert ignores.left_context_size == -1
        with pytest.raises(ValueError, match="follow_context is 'no'; it must be true or false"):
            RandomBlockMasking(*arguments, follow_context='no')

    def test_subclass_of_stock_style(self):
        class First(RandomBlockMasking):
            def forward_with_overlap(self, feats, lengths):
                return feats, torch.ones_like(feats)

        module = First(2, allow_overlap=True)
        assert module(torch.zeros(1, 2, 4), torch.tensor([4]))[1].all()


def runs(masks):
    """Return the lengths of all runs of masked frames in masks [B, T], as floats."""
    padded = torch.nn.functional.pad(masks.int(), (1, 1))
    steps = padded.diff(dim=1)
    return ((steps == -1).nonzero()[:, 1] - (steps == 1).nonzero()[:, 1]).float()


class TestModule:
    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
    def test_mask_embedding_learns(self, dtype):
        module = RandomBlockMasking(2, 0.3, 4, freeze=False)
        masked, masks = module(features(3, 2, 50, dtype), torch.tensor([50, 40, 30]))
        masked.float().sum().backward()
        assert module.mask_embedding.grad.tolist() == masks.float().sum(dim=(0, 2)).tolist()
        assert not RandomBlockMasking(2, 0.3, 4).mask_embedding.requires_grad


STREAM_SETTINGS = pytest.mark.parametrize(
    'arguments', [(0.01, 40, None, True, True), (0.5, 48, None, True, False)], ids=['overlap', 'apart']
)


def streamed(module, context, style='regular', frames=3520, step=80, streams=16):
    """Mask streams that come in steps of so many mask frames; [B, T] bool."""
    torch.manual_seed(0)
    line, window = module.new_stream(streams), Window(AttContext(*context), style)
    steps = [min(step, frames - start) for start in range(0, frames, step)]
    return torch.cat([module.draw_on(line, count, window) for count in steps], dim=1)


@STREAM_SETTINGS
class TestStreams:
    @pytest.mark.parametrize(
        'context, style',
        [
            *(((left, right), 'regular') for left, right in ((2, 0), (10, 0), (70, 0), (-1, 0), (4, 2))),
            *(((left, 3), 'chunked_limited') for left in (0, 8, -1)),
        ],
    )
    def test_masks_do_not_depend_on_the_steps_and_each_masked_frame_has_a_visible_one(self, arguments, context, style):
        module = RandomBlockMasking(1, *arguments, causal=True, subsampling_factor=8)
        masks = streamed(module, context, style)
        for step in (8, 37, 3520):
            assert torch.equal(streamed(module, context, style, step=step), masks)
        share = masked_share_per_frame(masks.unsqueeze(1), 8)
        assert (share > MASKED).sum() > 100
        assert not no_visible_frame(share, Window(AttContext(*context), style)).any()

    @pytest.mark.parametrize(
        'context, style', [((4, 2), 'regular'), ((8, 3), 'chunked_limited'), ((-1, 3), 'chunked_limited')]
    )
    def test_each_masked_frame_has_a_visible_one_wherever_the_stream_ends(self, arguments, context, style):
        module = RandomBlockMasking(1, *arguments, causal=True, subsampling_factor=8)
        share = masked_share_per_frame(streamed(module, context, style, streams=64).unsqueeze(1), 8)
        for end in range(1, 60):
            assert not no_visible_frame(share[:, :end], Window(AttContext(*context), style)).any()

    @pytest.mark.parametrize('context', [(5, 0), (10, 0), (20, 0), (70, 0), (-1, 0)])
    def test_a_stream_is_masked_as_much_as_a_whole_utterance(self, arguments, context):
        module = RandomBlockMasking(1, *arguments, causal=True, subsampling_factor=8)
        offline = time_mask(module, [1600] * 480, effective_window=Window(AttContext(*context))).float().mean()
        assert streamed(module, context, streams=240).float().mean() == pytest.approx(offline.item(), rel=0.15)

    def test_nothing_is_masked_where_a_frame_sees_itself_alone(self, arguments):
        assert not streamed(RandomBlockMasking(1, *arguments, subsampling_factor=8), (0, 0)).any()

    def test_a_call_masks_the_new_frames(self, arguments):
        module, masked, feats = RandomBlockMasking(1, *arguments), 0, features(1, 1, 40)
        line = module.new_stream(1)
        for _ in range(10):
            seen, masks = module(feats, torch.tensor([40]), effective_left_context=10, stream=line)
            assert torch.equal(seen, torch.where(masks > 0, module.mask_embedding.view(1, 1, 1), feats))
            masked += masks.sum()
        assert masked


CALLS = [
    dict(),
    dict(effective_left_context=5),
    dict(current_frame=30, effective_left_context=2),
    dict(current_frame=torch.tensor([20, 10]), effective_left_context=2),
    dict(current_frame=20),
    dict(effective_window=Window(AttContext(4, 3), 'chunked_limited')),
    dict(effective_window=Window(AttContext(2, 2))),
]
CALL_NAMES = ['whole', 'context', 'frame', 'frames', 'unlimited', 'chunks', 'look-ahead']


class TestDevices:
    @pytest.mark.parametrize(('call', 'allow_overlap'), zip(CALLS, cycle([True, False])), ids=CALL_NAMES)
    def test_compile(self, call, allow_overlap):
        torch._dynamo.reset()
        module = RandomBlockMasking(3, 0.1, 4, allow_overlap=allow_overlap, subsampling_factor=4)
        compiled = torch.compile(module, fullgraph=True, backend='eager')
        for frames in (40, 57):  # the second makes the shape dynamic
            x, lengths = features(2, 3, frames), torch.tensor([frames, 20])
            torch.manual_seed(0)
            expected = module(x, lengths, **call)
            torch.manual_seed(0)
            for out, same in zip(compiled(x, lengths, **call), expected):
                assert torch.equal(out, same)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('device', ['meta', 'cpu'])
@pytest.mark.parametrize('allow_overlap', [False, True])
@pytest.mark.parametrize('call', CALLS, ids=CALL_NAMES)
def test_features_on_another_device_and_of_another_dtype_than_the_module(dtype, device, allow_overlap, call):
    module = RandomBlockMasking(feat_in=3, block_size=4, mask_prob=0.1, causal=True, allow_overlap=allow_overlap)
    feats, lengths = features(2, 3, 200, dtype).to(device), torch.tensor([200, 90])
    for run in (module, module.forward_causal):
        masked, masks = run(input_feats=feats, input_lengths=lengths, **call)
        assert masked.shape == masks.shape == feats.shape
        assert masked.device == masks.device == feats.device and masked.dtype == masks.dtype == dtype


class EveryFourth(torch.nn.Module):
    """A pre_encode: [B, T, 2] -> [B, ceil(T / 4), 6]."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(2, 6, kernel_size=4, stride=4, padding=3)

    def forward(self, x, lengths):
        frames = (x.shape[1] + 3) // 4
        return self.conv(x.transpose(1, 2)).transpose(1, 2)[:, :frames], torch.div(
            lengths + 3, 4, rounding_mode='floor'
        )


@pytest.fixture
def wrapper():
    torch.manual_seed(0)
    return ConvFeatureMaksingWrapper(EveryFourth(), RandomBlockMasking(6, 0.4, 3, left_context_size=20))


class TestConvFeatureMaksingWrapper:
    x, lengths = features(16, 200, 2), torch.tensor([200, 120] * 8)

    def test_masks_attention_frames(self, wrapper):
        wrapper.set_masking_enabled(apply_mask=True)
        masked, lengths = wrapper(x=self.x, lengths=self.lengths)
        masks, feats = wrapper.get_current_mask().transpose(1, 2).bool(), wrapper.get_current_feat()
        assert masked.shape == masks.shape == feats.shape == (16, 50, 6)
        assert torch.equal(masked[~masks], feats[~masks])
        assert torch.equal(masked[masks].view(-1, 6)[0], wrapper.masking.mask_embedding)
        assert 0.3 < masks.float().mean() < 0.5 and not masks[1::2, 30:].any()
        assert not masked.requires_grad and not feats.requires_grad  # as in stock

    def test_context_and_position(self, wrapper):
        wrapper.set_masking_enabled(apply_mask=True, current_frame=40, effective_left_context=10)
        wrapper(self.x, self.lengths)
        masked_frames = wrapper.get_current_mask()[:, 0].any(dim=0).nonzero().flatten()
        assert masked_frames.min() >= 30 and masked_frames.max() < 40
        wrapper.set_masking_enabled(apply_mask=True, effective_left_context=2)
        wrapper(self.x, self.lengths)
        assert wrapper.get_current_mask()[..., :30].any()  # the position is forgotten
        for mask in wrapper.get_current_mask()[:, 0].tolist():
            assert count_unanswerable(mask, 1, 2) == 0

    def test_masking_module_of_stock(self):
        wrapper = ConvFeatureMaksingWrapper(EveryFourth(), patched._up.RandomBlockMasking(6, 0.4, 3))
        wrapper.set_masking_enabled(True)
        assert wrapper(self.x, self.lengths)[0].shape == (16, 50, 6)
