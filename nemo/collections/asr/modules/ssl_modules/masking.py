# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``masking.py``: block masking that keeps a visible frame in the attention window of every frame.

Blocks are drawn as stock draws them, on the whole time line. Where the window is limited, some attention frames are
kept visible, one in every window (``visible_frames.py``): they are cleared, and more blocks make up for the share.

Shapes: B batch, D features, T mask frames (frames of the tensor that is masked), A attention frames, S slots of a grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nemo.collections.asr.modules.ssl_modules.masked_time_line import BlockChances, MaskedTimeLine, kept_window
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, tightest
from nemo.collections.asr.parts.att_context.visible_frames import MASK_THRESHOLD, kept_visible_frames
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.core.neural_types import IntType, LengthsType, NeuralType
from nemo.utils import logging
from nemo_streaming_ssl import upstream

_up = upstream(globals())

SHORT_BLOCK = 8  # mask frames that stock 2.5.3 masks in an utterance too short for a block


@dataclass(frozen=True)
class Region:
    """What a call may mask, and how."""

    window: Window | None
    """The window in which a frame is kept visible; None: every frame may be masked."""
    overlap: bool
    """Whether blocks may overlap."""
    current_frame: int | torch.Tensor | None
    """Mask frames received so far; None: the whole utterance."""
    left: int
    """With ``current_frame``: attention frames before it that may be masked; -1 = all."""


@dataclass(frozen=True)
class _Line:
    """The mask frames of a batch; counts are int32 [B, 1]."""

    index: torch.Tensor  # [1, T]
    first: torch.Tensor  # of the available range
    end: torch.Tensor  # the frame after its last
    allowed: torch.Tensor  # [B, T] bool: available, and not kept visible
    free: torch.Tensor  # number of allowed frames
    limit: torch.Tensor  # most frames that may be masked
    keeps: bool  # whether any frame is kept visible

    @property
    def available(self) -> torch.Tensor:
        """Length of the available range, frames that are kept visible included."""
        return (self.end - self.first).clamp(min=0)

    @property
    def makes_up(self) -> torch.Tensor:
        """By how much more to mask so that the share stays, [B, 1] float64."""
        return self.available.double() / self.free.clamp(min=1)


class RandomBlockMasking(_up.RandomBlockMasking):
    """Mask random blocks of frames, and keep a visible frame in the attention window of every masked one.

    Every masked attention frame (more than 0.8 of its mask frames masked) has another frame without any masked mask
    frame in its window, if the window is limited or ``causal`` is set. Otherwise the distribution is stock's.

    Args:
        feat_in: number of features D.
        mask_prob: as in NeMo: with overlap, the probability that a frame starts a block; without, the share to mask.
        block_size: length of a block in mask frames.
        mask_value: value of masked frames; None makes a random ``mask_embedding``.
        freeze: whether ``mask_embedding`` is kept from training.
        allow_overlap: whether blocks may overlap.
        max_mask_ratio: share of the available range that is never exceeded by more than one block; where a block alone
            exceeds it, 8 frames are masked, as in NeMo 2.5.3, on one whole attention frame.
        causal: whether a visible frame is kept also where the left context is unlimited: at the beginning, where there
            is little past.
        left_context_size: left attention context in attention frames, -1 = unlimited.
        subsampling_factor: mask frames per attention frame; the model sets the encoder's factor where features are
            masked before its convolutions.
        follow_context: whether masks follow the attention context. False gives stock's masks: ``causal``,
            ``left_context_size`` and the encoder's context are ignored.

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
        self.follow_context = follow_context
        self.causal = causal
        self.left_context_size = left_context_size
        self.subsampling_factor = subsampling_factor

    @property
    def left_context_size(self) -> int:
        """The left context in attention frames, -1 = unlimited, for calls that name none.

        It is the tighter of the configured one, which assigning sets, and of what the encoder's tightest layer sees now.
        """
        return self._window().context.left

    @left_context_size.setter
    def left_context_size(self, left: int) -> None:
        self._left_context_size = left

    def within(self, window: Window | None) -> Window:
        """Narrow an attention window to the configured left context; ``follow_context: false`` ignores both.

        Args:
            window: None: not known.
        """
        if window is None or not self.follow_context:
            window = Window(AttContext(UNLIMITED, 0))
        left = tightest(window.context.left, self._left_context_size) if self.follow_context else UNLIMITED
        style = window.style if window.context.right else 'regular'
        return Window(AttContext(left, window.context.right), style)

    @property
    def input_types(self):
        """Return the definitions of the inputs."""
        return {
            **super().input_types,
            "current_frame": NeuralType(tuple('B'), LengthsType(), optional=True),
            "effective_left_context": NeuralType(elements_type=IntType(), optional=True),
            "effective_window": NeuralType(optional=True),
            "stream": NeuralType(optional=True),
        }

    def forward(
        self,
        input_feats: torch.Tensor,
        input_lengths: torch.Tensor,
        current_frame: int | torch.Tensor | None = None,
        effective_left_context: int | None = None,
        effective_window: Window | None = None,
        stream: MaskedTimeLine | None = None,
    ):
        """Mask a batch of features. Draws from torch's generator of the features' device, without synchronisation.

        Args:
            input_feats: features [B, D, T], any floating dtype, any device (the meta device too). NaN and infinity
                come out as NaN, masked or not.
            input_lengths: valid mask frames of each utterance [B].
            current_frame: mask frames received so far, an int or a tensor [B]: only the trailing window of them may be
                masked. None masks over the whole utterance.
            effective_left_context: left context in attention frames for this call, -1 = unlimited; overrides
                ``left_context_size``.
            effective_window: the window of an attention frame, where it has look-ahead; overrides both.
            stream: what was drawn for the frames received before, see :meth:`new_stream`. ``input_feats`` has the
                frames whose masks it remembers, and then new ones: those alone are drawn, and it moves on.

        Returns:
            masked_feats: [B, D, T], the input with ``mask_embedding`` in the masked frames; dtype of the input.
            masks: [B, D, T], 1 where masked, else 0, the same for all D (a view, not to be written to); same dtype.

        Raises:
            ValueError: if ``effective_left_context`` is below -1 or the int ``current_frame`` is negative.
        """
        if stream is not None:
            window = self._window(effective_left_context, effective_window)
            return self.fill(input_feats, self.draw_on(stream, input_feats.shape[2], window))
        given = _given(current_frame, effective_left_context, effective_window)  # stock's overrides take none
        if self.allow_overlap:
            return self.forward_with_overlap(input_feats, input_lengths, **given)
        return self.forward_without_overlap(input_feats, input_lengths, **given)

    def forward_with_overlap(self, input_feats, input_lengths, *args, **kwargs):
        """Mask blocks that may overlap; further arguments and results as in :meth:`forward`."""
        return self._draw_and_fill(input_feats, input_lengths, *args, overlap=True, **kwargs)

    def forward_without_overlap(self, input_feats, input_lengths, *args, **kwargs):
        """Mask blocks that do not overlap; further arguments and results as in :meth:`forward`."""
        return self._draw_and_fill(input_feats, input_lengths, *args, overlap=False, **kwargs)

    def forward_causal(self, input_feats, input_lengths, *args, **kwargs):
        """Mask as :meth:`forward` does with ``causal=True``, whatever the module's own setting."""
        return self._draw_and_fill(input_feats, input_lengths, *args, causal=True, **kwargs)

    def _draw_and_fill(self, feats, lengths, *args, **kwargs):
        return self.fill(feats, self.draw(lengths.to(feats.device), feats.shape[2], *args, **kwargs))

    def _window(self, effective_left_context: int | None = None, effective_window: Window | None = None) -> Window:
        """Return what an attention frame sees in a call with these arguments."""
        if effective_window is not None:
            return effective_window
        if effective_left_context is None:
            return self.within(None if self.attention_window is None else self.attention_window())
        left = effective_left_context
        _check('effective_left_context', left, left >= -1, '-1 (unlimited) or more')
        return Window(AttContext(left, 0))

    def _region(
        self, current_frame=None, effective_left_context=None, effective_window=None, overlap=None, causal=None
    ) -> Region:
        if isinstance(current_frame, int):
            _check('current_frame', current_frame, current_frame >= 0, 'the number of mask frames received, 0 or more')
        causal = (self.causal and self.follow_context) if causal is None else causal
        window = self._window(effective_left_context, effective_window)
        overlap = self.allow_overlap if overlap is None else overlap
        return Region(kept_window(window, causal), overlap, current_frame, window.context.left)

    def draw(self, lengths: torch.Tensor, frames: int, *args, **kwargs) -> torch.Tensor:
        """Draw which mask frames are masked; from torch's generator of the lengths' device, without synchronisation.

        Args:
            lengths: valid mask frames of each utterance [B].
            frames: T.
            args, kwargs: ``current_frame``, ``effective_left_context`` and ``effective_window`` as in :meth:`forward`;
                ``overlap`` and ``causal`` instead of the module's own settings.

        Returns:
            [B, T] bool, True where masked.

        Raises:
            ValueError: as :meth:`forward` does.
        """
        region = self._region(*args, **kwargs)
        line = self._line(lengths, frames, region)
        if self.mask_prob == 0 or frames == 0:
            return torch.zeros_like(line.allowed)
        masked = self._overlapping_blocks(line) if region.overlap else self._separate_blocks(line)
        short = self.block_size >= line.available.float() * self.max_mask_ratio
        masked = torch.where(short, self._one_short_block(line), line.allowed & masked)
        return self._leave_a_frame(self._thin_out(masked, line.limit), line)

    def fill(self, feats: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put ``mask_embedding`` into the masked frames.

        Args:
            feats: [B, D, T], any floating dtype.
            masked: [B, T] bool, True where masked.

        Returns:
            masked features and masks, as :meth:`forward` returns them.
        """
        masks = masked.unsqueeze(1).to(feats.dtype)
        # With weights of 0 and 1 exactly the one or the other, in half the time that torch.where takes on a CPU.
        masked_feats = torch.lerp(feats, self.mask_embedding.to(feats).view(1, -1, 1), masks)
        return masked_feats, masks.expand_as(feats)

    def new_stream(self, streams: int = 1, device=None) -> MaskedTimeLine:
        """Return what masking remembers of so many streams before their first frame."""
        return MaskedTimeLine.new(streams, self.block_size, device)

    def draw_on(self, stream: MaskedTimeLine, frames: int, window: Window) -> torch.Tensor:
        """Draw the new frames of streams; returns the masks of the last ``frames``, [B, T] bool.

        Args:
            stream: of the frames received before; it moves on.
            frames: T, those whose masks the stream remembers and the new ones.
            window: what each attention frame sees.
        """
        settings = self.mask_prob, self.block_size, self.allow_overlap, self.max_mask_ratio
        kept = kept_window(window, self.causal and self.follow_context)
        return stream.draw(frames, BlockChances.of(*settings, kept), self.subsampling_factor)

    def _line(self, lengths: torch.Tensor, frames: int, region: Region) -> _Line:
        index = torch.arange(frames, dtype=torch.int32, device=lengths.device).unsqueeze(0)
        end = lengths.to(torch.int32).clamp(max=frames).view(-1, 1)
        first = torch.zeros_like(end)
        if region.current_frame is not None:
            received = region.current_frame
            if isinstance(received, torch.Tensor):
                received = received.to(end.device, torch.int32).view(-1, 1)
            else:
                received = torch.full_like(end, received)
            end = torch.minimum(received, end)
            if region.left >= 0:
                first = (received - region.left * self.subsampling_factor).clamp(min=0)
        allowed = (index >= first) & (index < end)
        if region.window is not None:
            allowed &= ~self._kept_visible(end, frames, region.window)
        free = allowed.sum(dim=1, keepdim=True, dtype=torch.int32)
        limit = ((end - first).clamp(min=0).float() * self.max_mask_ratio).int() + self.block_size
        return _Line(index, first, end, allowed, free, torch.minimum(limit, free), region.window is not None)

    def _kept_visible(self, end: torch.Tensor, frames: int, window: Window) -> torch.Tensor:
        """Return which mask frames [B, T] are kept visible, for mask frames received [B, 1]."""
        factor = self.subsampling_factor
        index = torch.arange(math.ceil(frames / factor), dtype=torch.int32, device=end.device).unsqueeze(0)
        ends = end.div(factor, rounding_mode='floor')
        kept = kept_visible_frames(window, index, ends, _uniform(end.shape, end.device))
        return kept.repeat_interleave(factor, dim=1)[:, :frames]

    def _overlapping_blocks(self, line: _Line) -> torch.Tensor:
        """Let every frame start a block with equal probability; returns the frames of blocks, [B, T] bool."""
        block = self.block_size
        starts = (line.available - block).clamp(min=0)  # the first so many frames may start one, as in stock
        probability = self._start_probability(line, starts)
        is_start = (_uniform(line.allowed.shape, line.allowed.device) < probability) & (line.index >= line.first)
        is_start &= line.index < line.first + starts
        return line.index < torch.where(is_start, line.index + block, 0).cummax(dim=1).values

    def _start_probability(self, line: _Line, starts: torch.Tensor):
        """Return the probability of a start, [B, 1], that masks as many frames as stock in spite of those kept visible.

        A frame that k starts reach is masked with probability 1 - (1 - p)^k; k rises to the smaller of ``starts`` and the
        block, stays, and falls. In its place stands the one k that masks as many frames of the whole utterance.
        """
        if not line.keeps or self.mask_prob == 1:
            return self.mask_prob
        missed, starts = 1 - self.mask_prob, starts.clamp(min=1).double()
        top, frames = starts.clamp(max=self.block_size), starts + self.block_size - 1
        slopes = 2 * (top - 1 - (missed - missed**top) / self.mask_prob)
        share = (((frames + 2 - 2 * top) * (1 - missed**top) + slopes) / frames).clamp(max=1 - 1e-9)
        reach = torch.log1p(-share) / math.log(missed)
        return -torch.expm1(torch.log1p(-(share * line.makes_up).clamp(max=1)) / reach)

    def _separate_blocks(self, line: _Line) -> torch.Tensor:
        """Fill random slots of a grid of blocks with a random offset; returns the frames of blocks, [B, T] bool."""
        frames, device, shape = line.allowed.shape[1], line.end.device, line.end.shape
        blocks, block = self._number_and_size(line)
        slots = line.available // block
        if line.keeps:
            blocks = torch.minimum((blocks * line.makes_up + _uniform(shape, device)).int(), slots)
        slots = torch.where(blocks < slots, slots - 1, slots).clamp(min=0)  # stock leaves a slot for the offset
        room = torch.minimum(block, line.available - slots * block + 1)
        offset = line.first + (_uniform(shape, device) * room).int()

        # A block is block_size frames, or a (blocks + 1)-th of the range, rounded down: so many slots are enough.
        most_blocks = math.ceil(frames * self.mask_prob / self.block_size)
        most_slots = min(frames, max(frames // self.block_size, 2 * (most_blocks + 1)))
        score = _uniform((shape[0], most_slots), device)
        score = score.masked_fill(torch.arange(most_slots, device=device) >= slots, 2.0)
        last = score.sort(dim=1).values.gather(1, (blocks.long() - 1).clamp(min=0, max=most_slots - 1))
        chosen = (score <= last) & (blocks > 0) & (score < 2)

        slot = (line.index - offset).div(block, rounding_mode='floor')
        inside = (slot >= 0) & (slot < slots)
        return inside & chosen.gather(1, slot.clamp(min=0, max=most_slots - 1).long())

    def _number_and_size(self, line: _Line) -> tuple[torch.Tensor, torch.Tensor]:
        """Stock's number and size of blocks for the available range, [B, 1] each."""
        available = line.available
        blocks = torch.ceil(available.float() * self.mask_prob / self.block_size).int()
        too_long = (blocks + 1) * self.block_size > available
        block = torch.where(too_long, available // (blocks + 1), self.block_size).clamp(min=1)
        return torch.minimum(blocks, (available // block - 1).clamp(min=0)), block

    def _one_short_block(self, line: _Line) -> torch.Tensor:
        """Return one block of 8 frames, as stock 2.5.3 masks in a short utterance, on a whole attention frame; [B, T]."""
        factor = self.subsampling_factor
        length = line.limit.clamp(max=max(SHORT_BLOCK, factor))
        in_frame = torch.nn.functional.pad(line.allowed, (0, -line.allowed.shape[1] % factor))
        in_frame = in_frame.unflatten(1, (-1, factor)).sum(dim=2, dtype=torch.int32)  # [B, A], allowed mask frames
        before = in_frame.cumsum(dim=1, dtype=torch.int32) - in_frame
        score = _uniform(in_frame.shape, in_frame.device) + (in_frame == factor).int() + (before + length <= line.free)
        chosen = score.masked_fill(in_frame == 0, -1.0).argmax(dim=1, keepdim=True)
        rank = line.allowed.cumsum(dim=1, dtype=torch.int32) - before.gather(1, chosen)
        return line.allowed & (rank > 0) & (rank <= length)

    def _thin_out(self, masked: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        """Keep no more than ``limit`` [B, 1] of the masked frames [B, T], from a random one on, around the end."""
        count = masked.cumsum(dim=1, dtype=torch.int32)
        total = count[:, -1:]
        start = (_uniform(total.shape, total.device) * total).int()
        around = start + limit >= total
        end = torch.where(around, torch.minimum(start + limit - total, start), start + limit)
        return masked & ((count > start) ^ (count > end) ^ around)

    def _leave_a_frame(self, masked: torch.Tensor, line: _Line) -> torch.Tensor:
        """Unmask a random attention frame where two or more are all there is and all are masked; [B, T] bool."""
        if line.keeps:
            return masked  # one frame is kept visible
        frames, factor = masked.shape[1], self.subsampling_factor
        count = masked.cumsum(dim=1, dtype=torch.int32)
        start = torch.arange(0, frames, factor, device=masked.device)
        up_to = [torch.zeros_like(line.end), count[:, factor - 1 :: factor], count[:, -1:]]
        count_of_frame = torch.cat(up_to if frames % factor else up_to[:2], dim=1).diff(dim=1)
        counts = torch.where(line.end < 2 * factor, start < line.end, start + factor <= line.end)
        hidden = ((count_of_frame > MASK_THRESHOLD * factor) | ~counts).all(dim=1, keepdim=True)
        hidden = (hidden | (count[:, -1:] == line.end)) & (line.end > factor)
        spared = (_uniform(line.end.shape, masked.device) * (line.end // factor)).int()
        return masked & (line.index // factor != torch.where(hidden, spared, -1))


class ConvFeatureMaksingWrapper(_up.ConvFeatureMaksingWrapper):
    """Mask after the encoder's subsampling; takes the arguments of :class:`RandomBlockMasking` beforehand.

    (Stock's spelling is public API.) A mask frame here is an attention frame. The subsampling gets no gradient, as in stock,
    for the targets are made of its output: so it is frozen, and distributed training does not wait for its gradient.
    """

    def __init__(self, pre_encode_module: torch.nn.Module, masking_module: torch.nn.Module) -> None:
        super().__init__(pre_encode_module, masking_module)
        pre_encode_module.requires_grad_(False)
        logging.info("model.mask_position is post_conv: the encoder's subsampling is frozen.")
        self._mask: Callable | None = None

    def set_masking_enabled(
        self,
        apply_mask: bool,
        current_frame: int | torch.Tensor | None = None,
        effective_left_context: int | None = None,
        effective_window: Window | None = None,
        masking: Callable | None = None,
    ):
        """Set whether, and how, the coming forward passes mask.

        Args:
            apply_mask: whether they do.
            current_frame, effective_left_context, effective_window: see :meth:`RandomBlockMasking.forward`.
            masking: what to call with ``input_feats`` and ``input_lengths`` instead of the masking module.
        """
        super().set_masking_enabled(apply_mask=apply_mask)
        given = _given(current_frame, effective_left_context, effective_window)
        self._mask = partial(self.masking if masking is None else masking, **given)

    def get_sampling_frames(self):
        """Return the subsampling's; without it NeMo would set streaming up for chunks of 0 frames."""
        get = getattr(self.pre_encode, 'get_sampling_frames', None)
        return 0 if get is None else get()

    def get_streaming_cache_size(self):
        """Return the subsampling's."""
        get = getattr(self.pre_encode, 'get_streaming_cache_size', None)
        return 0 if get is None else get()

    def forward(self, x: torch.Tensor, lengths: torch.Tensor):
        """Subsample x [B, T, D], then mask as set; returns [B, A, d_model] and the lengths [B]."""
        feats, lengths = self.pre_encode(x=x, lengths=lengths)
        self.curr_feat = feats.detach()
        if not self.apply_mask:
            self.curr_mask = torch.zeros_like(feats.transpose(1, 2))
            return feats, lengths
        mask = self.masking if self._mask is None else self._mask
        masked_feats, self.curr_mask = mask(input_feats=feats.transpose(1, 2), input_lengths=lengths)
        return masked_feats.transpose(1, 2).detach(), lengths  # detached as in stock: targets come from this module


def _uniform(shape, device) -> torch.Tensor:
    """Random numbers in [0, 1) that are fine enough also where the default dtype is a half-precision one."""
    return torch.rand(shape, dtype=torch.float32, device=device)


def _given(current_frame, effective_left_context, effective_window) -> dict:
    """Return the arguments of a call that are not None."""
    given = dict(
        current_frame=current_frame,
        effective_left_context=effective_left_context,
        effective_window=effective_window,
    )
    return {name: value for name, value in given.items() if value is not None}


def _check(name: str, value, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
