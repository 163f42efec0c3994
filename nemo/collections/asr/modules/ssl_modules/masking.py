# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``masking.py``: keeps a visible frame in the attention window of every frame.

Blocks are drawn as stock draws them, on the whole time line. Where the window is limited, some attention frames are
kept visible, one in every window (``visible_frames.py``): they are cleared, and more blocks make up for the share.

Shapes: B batch, D features, T mask frames (frames of the tensor that is masked), A attention frames.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, tightest
from nemo.collections.asr.parts.att_context.visible_frames import kept_visible_frames
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.utils import logging
from nemo_streaming_ssl import upstream

_up = upstream(globals())

SHORT_BLOCK = 8  # mask frames that stock 2.5.3 masks in an utterance too short for a block
STREAM_FRAMES = 200  # attention frames, 16 s: a stream is masked as utterances of this length one after the other


@dataclass
class MaskedTimeLine:
    """What is drawn for streams beyond the frames that have come."""

    coming: torch.Tensor  # whether the next frames will be masked, [B, N] bool


@dataclass(frozen=True)
class _Region:
    """The mask frames that a call may mask; counts are int32 [B, 1]."""

    index: torch.Tensor  # [T]
    first: torch.Tensor  # of the available range
    end: torch.Tensor  # the frame after its last
    available: torch.Tensor  # its length, frames that are kept visible included
    short: torch.Tensor  # [B, 1] bool: too short for a block
    allowed: torch.Tensor  # [B, T] bool: available, and not kept visible
    rank: torch.Tensor  # [B, T]: number of allowed frames up to this one
    limit: torch.Tensor  # most frames that may be masked
    keeps: bool  # whether any frame is kept visible

    @property
    def free(self) -> torch.Tensor:
        """Number of allowed frames."""
        return self.rank[:, -1:]

    @property
    def makes_up(self) -> torch.Tensor:
        """By how much more to mask so that the share stays, [B, 1] float32."""
        return self.available / self.free.clamp(min=1)


class _Changes(NamedTuple):
    """Where blocks begin and end."""

    place: torch.Tensor  # mask frames [B, N]; those after the last count as its end
    count: torch.Tensor  # of blocks that begin there, less those that end, [B, N] int8


class RandomBlockMasking(_up.RandomBlockMasking):
    """Mask random blocks of frames, and keep a visible frame in the attention window of every masked one.

    Every masked attention frame (more than 0.8 of its mask frames masked) has another frame without any masked mask
    frame in its window, if the window is limited or ``causal`` is set. Otherwise the distribution is stock's.

    Args:
        feat_in, mask_value, freeze, allow_overlap: as in NeMo.
        mask_prob: with overlap, the probability that a frame starts a block; without, the share to mask.
        block_size: in mask frames.
        max_mask_ratio: share of the available range that is never exceeded by more than one block; where a block alone
            exceeds it, 8 frames are masked, as in NeMo 2.5.3, on one whole attention frame.
        causal: whether a visible frame is kept at the beginning, too, if the left context is unlimited.
        left_context_size: in attention frames, -1 = unlimited.
        subsampling_factor: mask frames per attention frame; a model that masks before its convolutions sets it.
        follow_context: false gives stock's masks: ``causal``, ``left_context_size`` and the encoder's context are ignored.

    Raises:
        ValueError: if an argument is out of range.
    """

    attention_window: Callable[[], Window | None] | None = None
    """Returns what the encoder's tightest layer sees at present; the model sets it. None: no encoder."""

    def __init__(
        self,
        feat_in: int,
        mask_prob: float = 0.5,
        block_size: int = 48,
        mask_value: float | None = None,
        freeze: bool = True,
        allow_overlap: bool = False,
        max_mask_ratio: float = 0.8,
        causal: bool = False,
        left_context_size: int = -1,
        subsampling_factor: int = 1,
        follow_context: bool = True,
    ):
        super().__init__(feat_in, mask_prob, block_size, mask_value, freeze, allow_overlap, max_mask_ratio)
        _check('mask_prob', mask_prob, 0 <= mask_prob <= 1, 'a probability')
        _check('block_size', block_size, block_size >= 1, '1 mask frame or more')
        _check('max_mask_ratio', max_mask_ratio, 0 <= max_mask_ratio <= 1, 'a share from 0 to 1')
        _check('left_context_size', left_context_size, left_context_size >= -1, '-1 (unlimited) or more')
        _check('subsampling_factor', subsampling_factor, subsampling_factor >= 1, '1 or more')
        _check('follow_context', follow_context, isinstance(follow_context, bool), 'true or false')
        self.block_size = int(block_size)  # 20.0, as of arithmetic in a config
        self.causal, self.follow_context = causal, follow_context
        self.left_context_size = left_context_size
        self.subsampling_factor = subsampling_factor

    @property
    def left_context_size(self) -> int:
        """The tighter of the left context that was configured or assigned, and of what the encoder sees now."""
        return self._window().context.left

    @left_context_size.setter
    def left_context_size(self, left: int) -> None:
        self._left_context_size = left

    def within(self, window: Window | None) -> Window:
        """Narrow a window (None: not known) to the configured left context, if masks follow the context."""
        if window is None or not self.follow_context:
            window = Window(AttContext(UNLIMITED, 0))
        left = tightest(window.context.left, self._left_context_size) if self.follow_context else UNLIMITED
        return Window(AttContext(left, window.context.right), window.style)

    def forward(
        self,
        input_feats: torch.Tensor,
        input_lengths: torch.Tensor,
        current_frame: int | torch.Tensor | None = None,
        effective_left_context: int | None = None,
        effective_window: Window | None = None,
        stream: MaskedTimeLine | None = None,
    ):
        """Mask a batch of features by torch's generator of their device, without synchronisation.

        Args:
            input_feats: [B, D, T], any floating dtype, any device. NaN and infinity come out as NaN, masked or not.
            input_lengths: in mask frames [B].
            current_frame: mask frames received so far, an int or a tensor [B]: only the trailing window of them may be
                masked. None masks over the whole utterance.
            effective_left_context: in attention frames, -1 = unlimited; overrides ``left_context_size``.
            effective_window: the window of an attention frame, where it has look-ahead; overrides both.
            stream: of :meth:`new_stream`, which moves on; ``input_feats`` are its new frames, as many in each.

        Returns:
            the features with ``mask_embedding`` in the masked frames, and the masks, 1 where masked (a view, the same
            for all D); both [B, D, T], dtype of the input.

        Raises:
            ValueError: if ``effective_left_context`` is below -1 or the int ``current_frame`` is negative.
        """
        if stream is not None:
            window = self._window(effective_left_context, effective_window)
            return self._fill(input_feats, self.draw_on(stream, input_feats.shape[2], window))
        mask = self.forward_with_overlap if self.allow_overlap else self.forward_without_overlap
        given = dict(
            current_frame=current_frame,
            effective_left_context=effective_left_context,
            effective_window=effective_window,
        )
        given = {name: value for name, value in given.items() if value is not None}
        return mask(input_feats, input_lengths, **given)  # stock's overrides take no more than the first two

    def forward_with_overlap(self, input_feats, input_lengths, *args, **kwargs):
        """Mask blocks that may overlap; further arguments and results as in :meth:`forward`."""
        return self._mask(input_feats, input_lengths, *args, overlap=True, **kwargs)

    def forward_without_overlap(self, input_feats, input_lengths, *args, **kwargs):
        """Mask blocks that do not overlap; further arguments and results as in :meth:`forward`."""
        return self._mask(input_feats, input_lengths, *args, overlap=False, **kwargs)

    def forward_causal(self, input_feats, input_lengths, *args, **kwargs):
        """Mask as :meth:`forward` does with ``causal=True``, whatever the module's own setting."""
        return self._mask(input_feats, input_lengths, *args, causal=True, **kwargs)

    def _mask(self, feats, lengths, *args, **kwargs):
        return self._fill(feats, self.draw(lengths.to(feats.device), feats.shape[2], *args, **kwargs))

    def _window(self, effective_left_context: int | None = None, effective_window: Window | None = None) -> Window:
        """Return what an attention frame sees in a call with these arguments."""
        if effective_window is not None:
            return effective_window
        if effective_left_context is None:
            return self.within(None if self.attention_window is None else self.attention_window())
        left = effective_left_context
        _check('effective_left_context', left, left >= -1, '-1 (unlimited) or more')
        return Window(AttContext(left, 0))

    def draw(
        self,
        lengths: torch.Tensor,
        frames: int,
        current_frame: int | torch.Tensor | None = None,
        effective_left_context: int | None = None,
        effective_window: Window | None = None,
        overlap: bool | None = None,
        causal: bool | None = None,
    ) -> torch.Tensor:
        """Draw which of so many frames are masked, [B, T] bool, for lengths [B]; see :meth:`forward`.

        ``overlap`` and ``causal`` come before the module's own settings.
        """
        window = self._window(effective_left_context, effective_window)
        kept = _kept_window(window, (self.causal and self.follow_context) if causal is None else causal)
        region = self._region(lengths, frames, current_frame, window.context.left, kept)
        if self.mask_prob == 0 or frames == 0:
            return torch.zeros_like(region.allowed)
        overlap = self.allow_overlap if overlap is None else overlap
        if overlap:
            masked = self._overlapping_blocks(region) | _cover(frames, self._one_short_block(region))
        else:
            masked = _cover(frames, self._separate_blocks(region), self._one_short_block(region))
        masked = _thin_out(region.allowed & masked, region.limit)
        return masked if region.keeps else self._leave_a_frame(masked, region)

    def _fill(self, feats: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put ``mask_embedding`` into frames [B, T] bool of features [B, D, T]; return as :meth:`forward`."""
        masks = masked.unsqueeze(1).to(feats.dtype)
        # With weights of 0 and 1 exactly the one or the other, in half the time that torch.where takes on a CPU.
        masked_feats = torch.lerp(feats, self.mask_embedding.to(feats).view(1, -1, 1), masks)
        return masked_feats, masks.expand_as(feats)

    def new_stream(self, streams: int = 1, device=None) -> MaskedTimeLine:
        """Return the state of masking for so many streams before their first frame."""
        return MaskedTimeLine(torch.zeros(streams, 0, dtype=torch.bool, device=device))

    def draw_on(self, stream: MaskedTimeLine, frames: int, window: Window) -> torch.Tensor:
        """Return the masks of new frames of streams, [B, N] bool, and draw more where they are not drawn yet."""
        left = window.in_whole_chunks().context.left
        if left != 0:
            window = Window(AttContext(left, 0))  # the look-ahead may be after the end of the stream
        drawn = math.ceil(STREAM_FRAMES / window.chunk) * window.chunk * self.subsampling_factor
        lengths = torch.full((len(stream.coming),), drawn, device=stream.coming.device)
        while stream.coming.shape[1] < frames:
            more = self.draw(lengths, drawn, effective_window=window)
            stream.coming = torch.cat((stream.coming, more), dim=1)
        masks, stream.coming = stream.coming[:, :frames], stream.coming[:, frames:]
        return masks

    def _region(self, lengths: torch.Tensor, frames: int, received, left: int, kept: Window | None) -> _Region:
        """Return what may be masked of lengths [B], or of the frames received, within a left context."""
        factor, device = self.subsampling_factor, lengths.device
        index = torch.arange(frames, dtype=torch.int32, device=device)
        end = lengths.to(torch.int32).clamp(max=frames).view(-1, 1)
        first = torch.zeros_like(end)
        if isinstance(received, int):
            _check('current_frame', received, received >= 0, 'the number of mask frames received, 0 or more')
            received = torch.full_like(end, received)
        if received is not None:
            received = received.to(device, torch.int32).view(-1, 1)
            end = torch.minimum(received, end)
            first = (received - left * factor).clamp(min=0) if left >= 0 else first
        allowed, available = index < end, end
        if received is not None:
            allowed &= index >= first
            available = (end - first).clamp(min=0)
        if kept is not None:
            attention_frames = torch.arange(math.ceil(frames / factor), dtype=torch.int32, device=device)
            ends = end.div(factor, rounding_mode='floor')
            visible = kept_visible_frames(kept, attention_frames, ends, _uniform(end.shape, device))
            allowed &= (~visible).repeat_interleave(factor, dim=1)[:, :frames]
        rank = allowed.cumsum(dim=1, dtype=torch.int32)
        most = available.float() * self.max_mask_ratio
        limit = torch.minimum(most.int() + self.block_size, rank[:, -1:])
        short = self.block_size >= most
        return _Region(index, first, end, available, short, allowed, rank, limit, kept is not None)

    def _overlapping_blocks(self, region: _Region) -> torch.Tensor:
        """Let every frame start a block with equal probability; returns the frames of blocks, [B, T] bool."""
        block = self.block_size
        starts = (region.available - block).clamp(min=0)  # the first so many frames may start one, as in stock
        starts = starts.masked_fill(region.short, 0)
        probability = self._start_probability(region, starts)
        is_start = _uniform(region.allowed.shape, region.allowed.device) < probability
        is_start &= (region.index >= region.first) & (region.index < region.first + starts)
        return region.index < torch.where(is_start, region.index + block, 0).cummax(dim=1).values

    def _start_probability(self, region: _Region, starts: torch.Tensor):
        """Return the start probability [B, 1] that masks as many frames as stock despite kept-visible ones.

        A frame that k starts reach is masked with probability 1 - (1 - p)^k; k rises to the smaller of ``starts`` and the
        block, stays, and falls. In its place stands the one k that masks as many frames of the whole utterance.
        """
        if not region.keeps or self.mask_prob == 1:
            return self.mask_prob
        missed, starts = 1 - self.mask_prob, starts.clamp(min=1).double()
        top, frames = starts.clamp(max=self.block_size), starts + self.block_size - 1
        slopes = 2 * (top - 1 - (missed - missed**top) / self.mask_prob)
        share = (((frames + 2 - 2 * top) * (1 - missed**top) + slopes) / frames).clamp(max=1 - 1e-9)
        reach = torch.log1p(-share) / math.log(missed)
        return -torch.expm1(torch.log1p(-(share * region.makes_up).clamp(max=1)) / reach)

    def _separate_blocks(self, region: _Region) -> _Changes:
        """Fill random slots of a grid of blocks at a random offset."""
        frames, device, shape = region.allowed.shape[1], region.end.device, region.end.shape
        blocks, block, slots = self._number_and_size(region.available)
        blocks = blocks.masked_fill(region.short, 0)
        if region.keeps:
            blocks = torch.minimum((blocks * region.makes_up + _uniform(shape, device)).int(), slots)
        slots = torch.maximum(blocks, slots - 1)  # stock leaves a slot for the offset
        room = torch.minimum(block, region.available - slots * block + 1)
        offset = region.first + (_uniform(shape, device) * room).int()

        # A block is block_size frames, or a (blocks + 1)-th of the range, rounded down: so many slots are enough.
        most_blocks = math.ceil(frames * self.mask_prob / self.block_size)
        most_slots = min(frames, max(frames // self.block_size, 2 * (most_blocks + 1)))
        score = _uniform((shape[0], most_slots), device)
        slot = torch.arange(most_slots + 1, dtype=torch.int32, device=device)
        score = score.masked_fill(slot[:-1] >= slots, 2.0)
        chosen = torch.nn.functional.pad(score.argsort(dim=1).argsort(dim=1) < blocks, (1, 1)).char()
        return _Changes(offset + slot * block, chosen.diff(dim=1))

    def _number_and_size(self, available: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stock's number and size of blocks for so many frames, and how many have room there, [B, 1] each."""
        blocks = torch.ceil(available.float() * self.mask_prob / self.block_size).int()
        block = (available // (blocks + 1)).clamp(min=1, max=self.block_size)
        slots = available // block
        return torch.minimum(blocks, (slots - 1).clamp(min=0)), block, slots

    def _one_short_block(self, region: _Region) -> _Changes:
        """Choose 8 frames of short utterances, as stock 2.5.3, and on one attention frame if it has as many."""
        factor, rank = self.subsampling_factor, region.rank
        length = region.limit.clamp(max=max(SHORT_BLOCK, factor))
        after = torch.cat((rank[:, factor - 1 : -1 : factor], rank[:, -1:]), dim=1)  # at the attention frames' ends
        before = torch.nn.functional.pad(after[:, :-1], (1, 0))
        # Whole attention frames come before others, and those that are followed by enough frames before both.
        score = _uniform(after.shape, after.device) + (after - before) + (before + length <= region.free)
        first = before.gather(1, score.argmax(dim=1, keepdim=True))
        ends = torch.searchsorted(rank, torch.cat((first, first + length), dim=1), right=True)
        begins = region.short.char()
        return _Changes(ends, torch.cat((begins, -begins), dim=1))

    def _leave_a_frame(self, masked: torch.Tensor, region: _Region) -> torch.Tensor:
        """Unmask a random attention frame where two or more are all there is and none is visible; [B, T] bool."""
        factor, end = self.subsampling_factor, region.end
        count = _per_attention_frame(masked, factor)
        start = torch.arange(0, masked.shape[1], factor, device=masked.device)
        visible = (count == 0) & torch.where(end < 2 * factor, start < end, start + factor <= end)  # [B, A]
        hidden = ~visible.any(dim=1, keepdim=True) & (end > factor)
        spared = (_uniform(end.shape, masked.device) * (end // factor)).int()
        return masked & (region.index // factor != torch.where(hidden, spared, -1))


class ConvFeatureMaksingWrapper(_up.ConvFeatureMaksingWrapper):
    """Mask after the encoder's subsampling, where mask frames are attention frames; stock's spelling.

    As in stock, targets are made of the subsampling's output, and it gets no gradient: so it is frozen, and distributed
    training does not wait for one.
    """

    def __init__(self, pre_encode_module: torch.nn.Module, masking_module: torch.nn.Module) -> None:
        super().__init__(pre_encode_module, masking_module)
        pre_encode_module.requires_grad_(False)
        logging.info("model.mask_position is post_conv: the encoder's subsampling is frozen.")

    def set_masking_enabled(self, apply_mask: bool, masking: Callable | None = None, **arguments):
        """Set whether the coming forward passes mask, by ``masking`` (None: the masking module).

        It is called with ``input_feats``, ``input_lengths`` and the ``arguments``, see :meth:`RandomBlockMasking.forward`.
        """
        super().set_masking_enabled(apply_mask=apply_mask)
        self._mask = partial(masking or self.masking, **arguments)

    def get_sampling_frames(self):
        """Return the subsampling's; without it NeMo would set streaming up for chunks of 0 frames."""
        return self.pre_encode.get_sampling_frames()

    def get_streaming_cache_size(self):
        """Return the subsampling's."""
        return self.pre_encode.get_streaming_cache_size()

    def forward(self, x: torch.Tensor, lengths: torch.Tensor):
        """Subsample x [B, T, D], then mask as set; returns [B, A, d_model] and the lengths [B]."""
        feats, lengths = self.pre_encode(x=x, lengths=lengths)
        self.curr_feat = feats.detach()
        if not self.apply_mask:
            self.curr_mask = torch.zeros_like(feats.transpose(1, 2))
            return feats, lengths
        masked_feats, self.curr_mask = self._mask(input_feats=feats.transpose(1, 2), input_lengths=lengths)
        return masked_feats.transpose(1, 2).detach(), lengths  # detached as in stock: targets come from this module


def _kept_window(window: Window, causal: bool) -> Window | None:
    """Return the window in which masking keeps a frame visible; None where every frame may be masked.

    Without a limit to the past only ``causal`` keeps one: at the beginning, where the past is short.
    """
    left, right = window.context
    if left == UNLIMITED and not causal:
        return None
    return Window(AttContext(UNLIMITED, 0)) if left == right == UNLIMITED else window


def _uniform(shape, device) -> torch.Tensor:
    """Random numbers in [0, 1) that are fine enough also where the default dtype is a half-precision one."""
    return torch.rand(shape, dtype=torch.float32, device=device)


def _per_attention_frame(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Return how many mask frames of each attention frame a mask [B, T] has, [B, A] int32."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % factor))
    return padded.unflatten(1, (-1, factor)).sum(dim=2, dtype=torch.int32)


def _cover(frames: int, *blocks: _Changes) -> torch.Tensor:
    """Return which of so many frames lie in blocks that do not overlap, [B, T] bool."""
    place, count = (torch.cat(part, dim=1) for part in zip(*blocks))
    line = torch.zeros(len(place), frames + 1, dtype=torch.int8, device=place.device)
    line.scatter_add_(1, place.clamp(max=frames), count)
    return line[:, :frames].cumsum(dim=1, dtype=torch.int8).bool()


def _thin_out(masked: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Keep at most ``limit`` [B, 1] masked frames of [B, T], from a random one on, around the end."""
    count = masked.cumsum(dim=1, dtype=torch.int32)
    total = count[:, -1:]
    start = (_uniform(total.shape, total.device) * total).int()
    end = start + torch.minimum(limit, total)
    around = end >= total
    end = torch.where(around, end - total, end)
    return masked & ((count > start) ^ (count > end) ^ around)


def _check(name: str, value, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
