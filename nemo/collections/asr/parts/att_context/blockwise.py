# SPDX-License-Identifier: Apache-2.0
"""Attention masks by layer, and attention within a limited context block by block, at linear cost.

Queries are cut into blocks, and each block uses only the keys that one of its queries can see, its window. As in the
Longformer (https://arxiv.org/abs/2004.05150), with the relative shifts of Transformer-XL
(https://arxiv.org/abs/1901.02860); exact for NeMo's attention styles.

Shapes: B batch, H heads, T attention frames, D features of a head, N blocks, C queries of a block, W keys of its
window, P distances between a query and the keys it may see.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nemo.collections.asr.parts.att_context.context import UNLIMITED
from nemo.collections.asr.parts.att_context.windows import Window

HIDDEN = -10000.0  # NeMo's score of a hidden key; the softmax of any dtype gives it a weight of exactly 0
COPIES_PER_SCORE = 40.0  # see _block_frames
MANY_WINDOWS = 16  # see AttentionBlocks.are_many
CHOICES = ('auto', 'on', 'off')  # of blockwise_attention
LEAST_RELATIVE, LEAST_PLAIN, LEAST_SDPA = (2, 128), (4, 192), (6, 256)  # (windows, frames), see wins_by_blocks


@dataclass(frozen=True)
class AttentionBlocks:
    """How T frames are cut into blocks, and which keys the window of a block holds.

    Key j of block n's window is frame ``n * queries - before + j``; there are zeros, hidden, where no such frame exists.
    """

    frames: int  # T
    queries: int  # C, of each block; the last may have fewer real ones
    before: int  # keys of the window before the block's first query
    after: int  # keys of the window after the block's last query
    past: int  # the largest distance from a query back to a key it may see
    future: int  # the largest distance from a query forward to a key it may see
    window: Window  # which frames a frame sees

    @classmethod
    def cut(cls, window: Window, frames: int) -> 'AttentionBlocks':
        """Return the blocks of T frames for a window that is limited on both sides."""
        context = window.context
        assert UNLIMITED not in context, context
        if not window.has_chunks:
            past, future = min(context.left, frames - 1), min(context.right, frames - 1)
            return cls(frames, _block_frames(past + future + 1), past, future, past, future, window)
        chunk = min(window.chunk, frames)
        before = min(context.left // window.chunk, (frames - 1) // chunk) * chunk
        queries = -(-_block_frames(before + chunk) // chunk) * chunk  # no chunk is in two blocks
        past = min(before + chunk - 1, frames - 1)
        return cls(frames, queries, before, 0, past, chunk - 1, window)

    @property
    def count(self) -> int:
        """N, the number of blocks."""
        return -(-self.frames // self.queries)

    @property
    def keys(self) -> int:
        """W, the frames in each block's window."""
        return self.before + self.queries + self.after

    @property
    def are_many(self) -> bool:
        """Whether the backward pass computes each block's inputs again instead of keeping them."""
        return self.frames >= MANY_WINDOWS * self.keys

    def queries_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pad [B, T, H, D] to whole blocks, [B, N * C, H, D]."""
        missing = self.count * self.queries - self.frames
        return F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor

    def windows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the window of each block: of [B, T, H, D] a copy, [B, H, N, W, D]."""
        C, W = self.queries, self.keys
        pieces = -(-W // C)  # a window is so many blocks after each other, the last of them in part
        total = (self.count + pieces - 1) * C
        padded = F.pad(tensor, (0, 0, 0, 0, self.before, total - self.before - self.frames))
        # Shifted views and one copy: the backward of an unfold takes longer than the attention.
        blocks = padded.unflatten(1, (total // C, C))
        shifted = [blocks[:, piece : piece + self.count, : W - piece * C] for piece in range(pieces)]
        return torch.cat(shifted, dim=2).permute(0, 3, 1, 2, 4)

    def place(self, scores: torch.Tensor) -> torch.Tensor:
        """Move scores of distances [B, H, N * C, P], from the farthest past, to the keys, [B, H, N, C, W]."""
        C = self.queries
        width = C - 1 + self.past + self.future + 1  # of a window that reaches all distances of all queries
        rows = F.pad(scores.unflatten(2, (self.count, C)), (0, C))
        # Rows of width + 1 read as rows of width: each begins one key later than the row before.
        shifted = rows.flatten(-2)[..., : C * width].unflatten(-1, (C, width))
        return shifted[..., self.past - self.before :][..., : self.keys]

    def hidden(self, padding: torch.Tensor) -> torch.Tensor:
        """Return the hidden keys of each query's window, [B, N, C, W] bool; True = hidden, as in ``padding``."""
        device = padding.device
        first = torch.arange(self.count, device=device).unsqueeze(1) * self.queries
        query = first + torch.arange(self.queries, device=device)  # [N, C], frames
        key = first + torch.arange(-self.before, self.queries + self.after, device=device)  # [N, W], frames
        absent = (key < 0) | (key >= self.frames)
        absent = absent | padding[:, key.clamp(0, self.frames - 1)]  # [B, N, W]
        return ~self.window.sees(query.unsqueeze(2), key.unsqueeze(1)) | absent.unsqueeze(2)


class BlockwiseMask:
    """Replaces the attention mask of layers that attend block by block; nothing in it is of size T x T."""

    def __init__(self, window: Window, padding: torch.Tensor):
        self.padding = padding  # [B, T] bool, True = padding
        self.blocks = AttentionBlocks.cut(window, padding.shape[1])
        hidden = self.blocks.hidden(padding).unsqueeze(1)
        # [B, 1, N, C, W] float32, added to the scores
        self.bias = torch.zeros(hidden.shape, device=padding.device).masked_fill_(hidden, HIDDEN)


@dataclass
class LayerAttentionMasks:
    """Stands in for the attention mask of a forward pass where layers differ in theirs."""

    masks: list[Any]  # each layer's: [B, T or T of the chunk, T] bool, True = hidden, or a BlockwiseMask

    def __getitem__(self, index: Any) -> 'LayerAttentionMasks':
        """Slice every mask, as the encoder does when it has a cache."""
        return LayerAttentionMasks([mask[index] for mask in self.masks])


def parse_choice(value: Any) -> str:
    """Read ``blockwise_attention``: auto, on or off, booleans in YAML; ValueError for anything else."""
    choice = {True: 'on', False: 'off'}[value] if isinstance(value, bool) else value
    if choice not in CHOICES:
        raise ValueError(f"model.encoder.blockwise_attention is {value!r}; it must be one of {', '.join(CHOICES)}")
    return choice


def wins_by_blocks(window: Window, frames: int, positions: bool, sdpa: bool) -> bool:
    """Return whether blocks are faster than NeMo's attention for T = ``frames``: a measured rule.

    The audio must be several times as long as the window of a block, and longer than some 10 s, by the kind of attention:
    with relative ``positions``, by ``scaled_dot_product_attention``; see ``benchmarks/attention.py --part rule``.
    """
    least_windows, least_frames = LEAST_RELATIVE if positions else LEAST_SDPA if sdpa else LEAST_PLAIN
    return frames >= least_frames and frames >= least_windows * AttentionBlocks.cut(window, frames).keys


def _block_frames(window: int) -> int:
    """Return the queries of a block, a multiple of 8, for a window of so many frames.

    Long blocks compute C scores for each query that are then hidden; short ones copy each key window / C times. The sum
    is least at C = sqrt(ratio of the two costs x window); ``benchmarks/attention.py --part blocks`` measures the ratio.
    """
    return max(8, round(math.sqrt(COPIES_PER_SCORE * window) / 8) * 8)
