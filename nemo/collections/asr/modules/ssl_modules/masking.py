# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``masking.py``: block masking that hides only what the attention context can answer.

Shapes: B batch, D features, T mask frames (frames of the tensor that is masked), A attention frames.

How a bounded context is kept answerable: some attention frames of each utterance, the *guards*, are never masked;
one lies in every window (``guards.py``). The guards are cut out of the time line, blocks are drawn as stock draws them
on what is left, and the guards are put back. Whatever is drawn, every masked frame then sees a guard.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from nemo.collections.asr.modules.ssl_modules.masked_time_line import BlockChances, MaskedTimeLine
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, tightest
from nemo.collections.asr.parts.att_context.visible_frames import MASK_THRESHOLD, kept_visible_frames
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.core.neural_types import IntType, LengthsType, NeuralType
from nemo.utils import logging
from nemo_streaming_ssl import upstream

_up = upstream(globals())

SHORT_BLOCK = 8  # mask frames that stock 2.5.3 masks in an utterance too short for a block
START_PROBABILITIES = 64  # tried, and interpolated between, to find one that makes up for the guards


class _TimeLine(NamedTuple):
    """The mask frames that may be masked, and the lengths that say how many are to be; int32, the narrowest that fits."""

    allowed: torch.Tensor  # [B, T] bool: in the available range, and no guard
    rank: torch.Tensor  # [B, T] or [1, T]: number of allowed frames up to this one; the first allowed frame's is 1
    length: torch.Tensor  # [B, 1]: number of allowed frames
    available: torch.Tensor  # [B, 1]: length of the available range, guards included
    end: torch.Tensor  # [B, 1]: the frame after the last of the available range
    limit: torch.Tensor  # [B, 1]: most frames that may be masked
    guarded: bool  # whether there are guards
    whole: bool  # whether all frames before the end are allowed: ranks are places


class RandomBlockMasking(_up.RandomBlockMasking):
    """Mask random blocks of frames, within what an attention context can answer.

    Every masked attention frame (more than 0.8 of its mask frames masked) sees another frame without any masked mask
    frame in its window, if the window is limited or ``causal`` is set. Otherwise the distribution is stock's.

    Args:
        feat_in: number of features D.
        mask_prob: as in NeMo: with overlap, the probability that a frame starts a block; without, the share to mask.
        block_size: length of a block in mask frames.
        mask_value: value of masked frames; None makes a random ``mask_embedding``.
        freeze: whether ``mask_embedding`` is kept from training.
        allow_overlap: whether blocks may overlap.
        max_mask_ratio: share of the available range that is never exceeded by more than one block; where a block alone
            exceeds it, 8 frames are masked, as in NeMo 2.5.3.
        causal: whether every masked frame must be answerable also where the left context is unlimited: at the
            beginning, where there is little past.
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
        """Mask a batch of features. Draws from torch's generator of the features' device; never waits for it.

        Args:
            input_feats: features [B, D, T], any floating dtype, any device (the meta device too). NaN and infinity
                come out as NaN, masked or not.
            input_lengths: valid mask frames of each utterance [B].
            current_frame: mask frames received so far, an int or a tensor [B]: only the trailing window of them may be
                masked. None masks over the whole utterance.
            effective_left_context: left context in attention frames for this call, -1 = unlimited; overrides
                ``left_context_size``.
            effective_window: what each attention frame sees, where it looks ahead; overrides both. Then the frames
                after a masked one can answer it, too.
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
        given = {
            'current_frame': current_frame,
            'effective_left_context': effective_left_context,
            'effective_window': effective_window,
        }
        given = {name: value for name, value in given.items() if value is not None}  # stock's overrides take none
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
        """Draw which mask frames are masked; from torch's generator of the lengths' device, without a wait for it.

        Args:
            lengths: valid mask frames of each utterance [B].
            frames: T.
            current_frame, effective_left_context, effective_window: as in :meth:`forward`.
            overlap: whether blocks may overlap; None: ``allow_overlap``.
            causal: whether every masked frame must be answerable, whatever the context; None: the module's own setting.

        Returns:
            [B, T] bool, True where masked.

        Raises:
            ValueError: as :meth:`forward` does.
        """
        causal = (self.causal and self.follow_context) if causal is None else causal
        window = self._window(effective_left_context, effective_window)
        line = self._time_line(lengths, frames, current_frame, window, causal)
        overlap = self.allow_overlap if overlap is None else overlap
        return self._overlapping_blocks(line) if overlap else self._separate_blocks(line)

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
        """Draw on, for the frames of streams that are new; returns the masks of the last ``frames``, [B, T] bool.

        Args:
            stream: of the frames received before; it moves on.
            frames: T, those whose masks the stream remembers and the new ones.
            window: what each attention frame sees.
        """
        settings = self.mask_prob, self.block_size, self.allow_overlap, self.max_mask_ratio
        chances = BlockChances.of(*settings, self._guards_of(window, self.causal and self.follow_context))
        return stream.draw(frames, chances, self.subsampling_factor)

    def _time_line(self, lengths, max_time: int, current_frame, window: Window, causal: bool) -> _TimeLine:
        batch, device = lengths.shape[0], lengths.device
        places = torch.arange(1, max_time + 1, dtype=torch.int32, device=device).unsqueeze(0)
        lengths = lengths.to(torch.int32).clamp(max=max_time).view(batch, 1)

        first, end = self._available_range(lengths, current_frame, window.context.left)
        allowed = places <= end
        if first is not None:
            allowed &= places > first
        free = self._free_of_guards(end, max_time, window, causal)
        if free is not None:
            allowed &= free

        whole = first is None and free is None
        rank = places if whole else allowed.cumsum(dim=1, dtype=torch.int32)
        length = end if whole or max_time == 0 else rank[:, -1:]
        available = end if first is None else (end - first).clamp(min=0)
        limit = (available.float() * self.max_mask_ratio).int() + self.block_size
        limit = torch.minimum(limit, length)
        return _TimeLine(allowed, rank, length, available, end, limit, free is not None, whole)

    def _available_range(self, lengths, current_frame, left):
        """Return the first mask frame [B, 1] that may be masked (None: 0), and the one after the last [B, 1]."""
        if current_frame is None:
            return None, lengths
        if isinstance(current_frame, torch.Tensor):
            current_frame = current_frame.to(lengths.device, torch.int32).view(-1, 1)
        else:
            _check('current_frame', current_frame, current_frame >= 0, 'the number of mask frames received, 0 or more')
            current_frame = torch.full_like(lengths, current_frame)
        end = torch.minimum(current_frame, lengths)
        return (None if left < 0 else (current_frame - left * self.subsampling_factor).clamp(min=0)), end

    def _free_of_guards(self, end: torch.Tensor, max_time: int, window: Window, causal: bool):
        """Return which mask frames [B, T] lie in no guard, an attention frame kept unmasked; None for all.

        Args:
            end: mask frames of each utterance that have been received, [B, 1].
        """
        window = self._guards_of(window, causal)
        if window is None:
            return None
        index = torch.arange(math.ceil(max_time / self.subsampling_factor), dtype=torch.int32, device=end.device)
        ends = end.div(self.subsampling_factor, rounding_mode='floor')
        guards = kept_visible_frames(window, index.unsqueeze(0), ends, _uniform(end.shape, end.device))
        return ~guards.repeat_interleave(self.subsampling_factor, dim=1)[:, :max_time]

    @staticmethod
    def _guards_of(window: Window, causal: bool) -> Window | None:
        """Return the window that guards are placed for; None where every frame may be masked.

        Without a limit to the past only ``causal`` asks for guards: at the beginning, where the past is short.
        """
        if window.context.left == UNLIMITED and not causal:
            return None
        sees_all = window.context.left == window.context.right == UNLIMITED
        return Window(AttContext(UNLIMITED, 0)) if sees_all else window

    def _overlapping_blocks(self, line: _TimeLine) -> torch.Tensor:
        """Let every frame start a block with equal probability; returns the masked frames [B, T] bool."""
        if self.mask_prob == 0:
            return torch.zeros_like(line.allowed)
        block = (line.length - 1).clamp(min=1, max=self.block_size)
        starts = line.length - block  # frames that may start a block: the first of so many ranks, as in stock
        short, short_start, short_block = self._one_short_block(line)
        probability = torch.where(short, 0.0, self._start_probability(line, starts, block))
        block = torch.where(short, short_block, block)

        is_start = (_uniform(line.allowed.shape, line.allowed.device) < probability) & (line.rank <= starts)
        is_start = (is_start & line.allowed) | (line.rank == torch.where(short, short_start, -1))
        last_start = torch.where(is_start, line.rank, -self.block_size).cummax(dim=1).values
        masked = line.allowed & (line.rank < last_start + block)
        return self._leave_a_frame(self._thin_out(masked, line.limit), line)

    def _start_probability(self, line: _TimeLine, starts: torch.Tensor, block: torch.Tensor):
        """The probability [B, 1] of a start that masks, beside the guards, as many frames as stock masks without."""
        if not line.guarded:
            return self.mask_prob
        stock_starts = (line.available - self.block_size).clamp(min=0)
        target = _expected_cover(stock_starts, torch.full_like(block, self.block_size), self.mask_prob)
        candidates = torch.logspace(
            math.log10(self.mask_prob), 0, START_PROBABILITIES, dtype=torch.float64, device=block.device
        )
        cover = _expected_cover(starts, block, candidates)
        above = (cover < target).sum(dim=1, keepdim=True).clamp(min=1, max=START_PROBABILITIES - 1)
        low, high = cover.gather(1, above - 1), cover.gather(1, above)
        part = ((target - low) / (high - low).clamp(min=1e-9)).clamp(min=0, max=1)
        return torch.lerp(candidates[above - 1], candidates[above], part).float()

    def _thin_out(self, masked: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        """Keep no more than ``limit`` [B, 1] of the masked frames [B, T], from a random one on, around the end."""
        count = masked.cumsum(dim=1, dtype=torch.int32)
        total = count[:, -1:] if count.shape[1] else torch.zeros_like(limit)
        start = (_uniform(total.shape, total.device) * total).int()
        around = start + limit >= total
        end = torch.where(around, torch.minimum(start + limit - total, start), start + limit)
        return masked & ((count > start) ^ (count > end) ^ around)

    def _separate_blocks(self, line: _TimeLine) -> torch.Tensor:
        """Fill random slots of a grid of blocks with a random offset; returns the masked frames [B, T] bool."""
        max_time = line.allowed.shape[1]
        most_blocks = math.ceil(max_time * self.mask_prob / self.block_size)
        if most_blocks == 0:
            return torch.zeros_like(line.allowed)
        blocks, block = self._number_and_size(line)
        slots = line.length // block
        slots = torch.where(blocks < slots, slots - 1, slots).clamp(min=0)  # stock leaves a slot for the offset
        room = torch.minimum(block, line.length - slots * block + 1)
        offset = (_uniform(room.shape, room.device) * room).int()

        # A block is block_size frames, or a (blocks + 1)-th of the range, rounded down: so many slots are enough.
        most_slots = min(max_time, max(max_time // self.block_size, 2 * (most_blocks + 1)))
        index = torch.arange(most_slots, dtype=torch.int32, device=slots.device)
        score = _uniform((slots.shape[0], most_slots), slots.device).masked_fill(index >= slots, -1.0)
        start = score.topk(most_blocks, dim=1).indices * block + offset + 1
        chosen = index[:most_blocks] < blocks

        short, short_start, short_block = self._one_short_block(line)
        start = torch.where(short, short_start, start)
        chosen = torch.where(short, index[:most_blocks] == 0, chosen)
        return self._leave_a_frame(self._cover(line, start, torch.where(short, short_block, block), chosen), line)

    def _cover(self, line: _TimeLine, start: torch.Tensor, block: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the allowed frames [B, T] bool of the chosen blocks.

        Args:
            start: ranks [B, N] of their first frames; block: their length [B, 1]; chosen: [B, N] bool.
        """
        batch, max_time = line.allowed.shape
        change = torch.zeros(batch, max_time + 2, dtype=torch.int32, device=start.device)
        first, beyond = (place.clamp(max=max_time + 1).long() for place in (start, start + block))
        change.scatter_add_(1, first, chosen.int()).scatter_add_(1, beyond, -chosen.int())
        covered = change.cumsum(dim=1, dtype=torch.int32) > 0  # by rank
        return line.allowed & (covered[:, 1:-1] if line.whole else covered.gather(1, line.rank.long()))

    def _number_and_size(self, line: _TimeLine) -> tuple[torch.Tensor, torch.Tensor]:
        """Stock's number and size of blocks for the available range, [B, 1] each, cut to what may be masked."""
        blocks = torch.ceil(line.available.float() * self.mask_prob / self.block_size).int()
        block = torch.where(
            (blocks + 1) * self.block_size > line.available, line.available // (blocks + 1), self.block_size
        ).clamp(min=1)
        blocks = torch.minimum(blocks, (line.available // block - 1).clamp(min=0))
        all_but_guards = (blocks * block >= line.length) & (line.limit == line.length)
        block = torch.where(all_but_guards, line.length.clamp(min=1), block)
        return torch.minimum(blocks, line.limit // block), block

    def _one_short_block(self, line: _TimeLine) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which utterances are too short for a block, and where their one block of 8 frames, as in stock 2.5.3, lies.

        Returns:
            [B, 1] bool; the rank of the block's first frame, at random, and the block's length, [B, 1] int32.
        """
        short = self.block_size >= line.available.float() * self.max_mask_ratio
        block = line.limit.clamp(max=SHORT_BLOCK)
        start = (_uniform(block.shape, block.device) * (line.length - block + 1)).int() + 1
        return short, start, block

    def _leave_a_frame(self, masked: torch.Tensor, line: _TimeLine) -> torch.Tensor:
        """Unmask a random attention frame where two or more are all there is and all are masked; [B, T] bool."""
        max_time, factor = masked.shape[1], self.subsampling_factor
        if line.guarded or max_time == 0:
            return masked  # the first attention frame is a guard
        count = masked.cumsum(dim=1, dtype=torch.int32)
        start = torch.arange(0, max_time, factor, device=masked.device)
        up_to = [torch.zeros_like(line.end), count[:, factor - 1 :: factor], count[:, -1:]]
        count_of_frame = torch.cat(up_to if max_time % factor else up_to[:2], dim=1).diff(dim=1)
        counts = torch.where(line.end < 2 * factor, start < line.end, start + factor <= line.end)
        hidden = ((count_of_frame > MASK_THRESHOLD * factor) | ~counts).all(dim=1, keepdim=True)
        hidden = (hidden | (count[:, -1:] == line.end)) & (line.end > factor)
        spared = (_uniform(line.end.shape, masked.device) * (line.end // factor)).int()
        attention_frame = torch.arange(max_time, dtype=torch.int32, device=masked.device) // factor
        return masked & (attention_frame != torch.where(hidden, spared, -1))


class ConvFeatureMaksingWrapper(_up.ConvFeatureMaksingWrapper):
    """Mask after the encoder's subsampling; takes the arguments of :class:`RandomBlockMasking` beforehand.

    (Stock's spelling is public API.) A mask frame here is an attention frame. The subsampling gets no gradient, as in stock,
    for the targets are made of its output: so it is frozen, and distributed training does not wait for its gradient.
    """

    def __init__(self, pre_encode_module: torch.nn.Module, masking_module: torch.nn.Module) -> None:
        super().__init__(pre_encode_module, masking_module)
        pre_encode_module.requires_grad_(False)
        logging.info("model.mask_position is post_conv: the encoder's subsampling is frozen.")
        self._mask = None

    def set_masking_enabled(
        self,
        apply_mask: bool,
        current_frame: int | torch.Tensor | None = None,
        effective_left_context: int | None = None,
        effective_window: Window | None = None,
        masking: Callable | None = None,
    ):
        """Say whether, and how, the coming forward passes mask.

        Args:
            apply_mask: whether they do.
            current_frame, effective_left_context, effective_window: see :meth:`RandomBlockMasking.forward`.
            masking: what to call with ``input_feats`` and ``input_lengths`` instead of the masking module.
        """
        super().set_masking_enabled(apply_mask=apply_mask)
        given = {
            'current_frame': current_frame,
            'effective_left_context': effective_left_context,
            'effective_window': effective_window,
        }
        given = {name: value for name, value in given.items() if value is not None}
        self._mask = partial(self.masking if masking is None else masking, **given)

    def get_sampling_frames(self):
        """What the encoder's subsampling says; without it NeMo would set streaming up for chunks of 0 frames."""
        get = getattr(self.pre_encode, 'get_sampling_frames', None)
        return 0 if get is None else get()

    def get_streaming_cache_size(self):
        """What the encoder's subsampling says."""
        get = getattr(self.pre_encode, 'get_streaming_cache_size', None)
        return 0 if get is None else get()

    def forward(self, x: torch.Tensor, lengths: torch.Tensor):
        """Subsample x [B, T, D], then mask as told; returns [B, A, d_model] and the lengths [B]."""
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


def _expected_cover(starts: torch.Tensor, block: torch.Tensor, probability) -> torch.Tensor:
    """How many frames are masked on average if each of so many adjacent frames starts a block with a probability.

    A frame that k of the starts can reach is masked with probability 1 - (1 - p)^k; k rises to the smaller of
    ``starts`` and ``block``, stays, and falls.

    Args:
        starts, block: [B, 1] int64.
        probability: p, above 0, a number or a tensor [P].

    Returns:
        [B, 1] or [B, P] float64.
    """
    top, length = torch.minimum(starts, block).double(), torch.maximum(starts, block) + 1 - starts.minimum(block)
    missed = 1 - probability
    plateau = length * (1 - missed**top)
    slopes = 2 * (top - 1 - (missed - missed**top) / probability)
    return torch.where(starts > 0, plateau + slopes, 0.0)


def _check(name: str, value, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
