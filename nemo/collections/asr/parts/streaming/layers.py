# SPDX-License-Identifier: Apache-2.0
"""Conformer layers for many live streams at once, with cached keys, values and projected positions.

NeMo's layer projects keys, values and positions of its whole cache in each step. Here they are projected once: the key of
frame j is in slot j % S of a ring buffer. Frames *arrive* (first feed-forward, query, key and value), wait for the layer's look-ahead
of r frames, and are *emitted* (attention, convolution, second feed-forward). Positions before a stream's first go through all
layers like others, but no query sees them and they leave nothing in the convolution.

Shapes: B streams, R of them, Q frames of a push, D the width, H heads, K width of a head, S slots of a ring, P positions.
"""

import copy
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo.collections.asr.modules.ssl_modules.quantizers import without_autocast
from nemo.collections.asr.parts.streaming.linear import linear_in
from nemo.collections.asr.parts.streaming.ring_buffers import RingWindow, Rows, Stage, Visible, ring_window
from nemo.collections.asr.parts.submodules.multi_head_attention import RelPositionalEncoding

FEW = 8  # frames up to which the convolution is faster as one sum
GROWTH = 64  # first number of slots of a ring without a limit
SHRINKS_AT = 4  # times the slots in use
_LOCK = threading.Lock()


@dataclass(eq=False)
class PositionTable:
    """Scores of a layer's queries for relative positions, from the farthest future to the farthest past, and hidden ones."""

    keys: Tensor  # [H, K, P]
    shared: Tensor  # scores that all queries share, [H, 1, P]


class LayerStage(Stage):
    """What one layer keeps of all streams; the ring of a window without a limit grows.

    ``count`` are the frames pushed through all layers, [B], of which ``behind`` wait in the layers before; all layers share it.
    """

    def __init__(self, batch: int, layer: 'PreparedLayer', window: RingWindow, behind: int, count: np.ndarray):
        like = dict(dtype=layer.taps.dtype, device=layer.taps.device)
        self.layer, self.window, self.behind, self.count = layer, window, behind, count
        self.table = layer.positions(window.future, window.past)
        keys_values = torch.zeros(2, batch, layer.heads, window.slots, layer.head_width, **like)
        self.keys_values = keys_values.transpose(0, 1)  # in memory apart, else each product over B copies them
        self.convolution = torch.zeros(batch, len(layer.taps) - 1, layer.width, **like)
        self.waiting, self.queries = (torch.zeros(batch, window.wait, layer.width, **like) for _ in range(2))

    def reserve(self, more: int = 0, least: int = 0) -> None:
        """Give an unlimited ring as many slots as the longest stream has frames; release far too many."""
        now, needed = self.window.slots, max(int(self.count.max()) - self.behind + more, least, 1)
        if not self.window.is_unlimited or now // SHRINKS_AT < needed <= now:
            return
        slots = max(1 << (needed - 1).bit_length(), GROWTH)
        if slots == now:
            return
        keys_values = F.pad(self.keys_values.transpose(0, 1), (0, 0, 0, slots - now)).transpose(0, 1)  # also shortens
        window = ring_window(self.window.window, slots, self.window.wait, self.window.device)
        table = self.layer.positions(window.future, window.past)
        self.keys_values, self.window, self.table = keys_values, window, table  # all of them or, interrupted, none

    def reset(self, rows: list[int], counts: bool = True) -> None:
        """Set all that some rows hold to 0."""
        super().reset(rows, counts)
        self.reserve()

    def export(self, row: int) -> dict[str, Any]:
        """Return a copy of a row; of a ring without a limit the slots in use."""
        state = super().export(row)
        if self.window.is_unlimited:
            state['keys_values'] = state['keys_values'][:, :, : max(state['count'] - self.behind, 0)].clone()
        return state

    def like(self) -> dict[str, Any]:
        """Return what a state must be like to be loaded; a ring without a limit has any number of slots."""
        like = super().like()
        if self.window.is_unlimited:
            like['keys_values'] = like['keys_values'][:, :, :0]
        return like

    def check(self, state: Any) -> None:
        """Raise ValueError unless :meth:`load` can take a state."""
        super().check(state)
        slots, frames = state['keys_values'].shape[2], max(state['count'] - self.behind, 0)
        if self.window.is_unlimited and slots != frames:
            raise ValueError(f"load: LayerStage is damaged; it has the keys of {slots} frames, and {frames} have come")

    def load(self, row: int, state: dict[str, Any]) -> None:
        """Replace a row by an exported state, which has been checked."""
        given = state['keys_values']
        self.reserve(least=given.shape[2])  # other streams may have more frames
        super().load(row, {**state, 'keys_values': F.pad(given, (0, 0, 0, self.window.slots - given.shape[2]))})

    def bytes(self) -> int:
        """Return how many bytes its tensors and its table of positions take."""
        return super().bytes() + self.table.keys.nbytes + self.table.shared.nbytes


class PreparedLayer:
    """A copy of the weights of a ``ConformerLayer`` with enabled adapters, in one of ``LINEARS``."""

    def __init__(self, layer: torch.nn.Module, precision: str = 'float32'):
        attention, convolution, depthwise = layer.self_attn, layer.conv, layer.conv.depthwise_conv
        self.heads, self.head_width = attention.h, attention.d_k
        self.width, scale = self.heads * self.head_width, 1 / attention.s_d_k
        self.norm_first, self.norm_attention = _norm(layer.norm_feed_forward1), _norm(layer.norm_self_att)
        self.norm_convolution, self.norm_second = _norm(layer.norm_conv), _norm(layer.norm_feed_forward2)
        self.norm_out, self.convolution_norm = _norm(layer.norm_out), _convolution_norm(convolution)

        def linear(module: torch.nn.Module, scale: float = 1.0) -> Callable[..., Tensor]:
            return linear_in(precision, module.weight, module.bias, scale)

        def feed_forward(half: torch.nn.Module) -> Callable[..., Tensor]:
            inner, outer = linear(half.linear1), linear(half.linear2, layer.fc_factor)
            return lambda frames: outer(F.silu(inner(frames), inplace=True))

        self.first, self.second = feed_forward(layer.feed_forward1), feed_forward(layer.feed_forward2)
        parts = attention.linear_q, attention.linear_k, attention.linear_v
        query, *others = (part.weight.detach() for part in parts)
        bias_u, bias_v = (each.detach().flatten() for each in (attention.pos_bias_u, attention.pos_bias_v))
        query_bias, *biases = (torch.zeros_like(bias_u) if part.bias is None else part.bias.detach() for part in parts)
        bias = torch.cat(((query_bias + bias_u) * scale, *biases))  # positions get the difference to the other
        self.projections = linear_in(precision, torch.cat((query * scale, *others)), bias)  # in one product
        self.out = linear(attention.linear_out)
        self.position_weight = attention.linear_pos.weight.detach().clone()
        self.bias_difference = ((bias_v - bias_u) * scale).view(self.heads, 1, self.head_width)
        self.pointwise1, self.pointwise2 = linear(convolution.pointwise_conv1), linear(convolution.pointwise_conv2)
        self.taps = depthwise.weight.detach()[:, 0].t().clone(memory_format=torch.contiguous_format)  # [kernel, D]
        self.tap_bias = torch.zeros_like(self.taps[0]) if depthwise.bias is None else depthwise.bias.detach().clone()
        self._tables: weakref.WeakValueDictionary[tuple[int, int], PositionTable] = weakref.WeakValueDictionary()
        self.adapters = [copy.deepcopy(adapter.module) for adapter in enabled_adapters(layer)]

    def positions(self, future: int, past: int) -> PositionTable:
        """Return the table of so many frames after and before; shared, and kept while a session uses it."""
        weight = self.position_weight
        with _LOCK, torch.inference_mode(False), torch.no_grad(), without_autocast(weight.device):
            found = self._tables.get((future, past))
            if found is None:
                encoding = RelPositionalEncoding(self.width, 0.0)
                encoding.extend_pe(max(future, past) + 1, weight.device, weight.dtype)
                centre = encoding.pe.shape[1] // 2  # the embedding of distance 0; greater distances are before it
                keys = F.linear(encoding.pe[0, centre - past : centre + future + 1].flip(0), weight)
                keys = keys.view(-1, self.heads, self.head_width).permute(1, 2, 0)
                # finite, so that a frame without visible slots is not NaN
                shared = F.pad(torch.bmm(self.bias_difference, keys), (0, 1), value=torch.finfo(keys.dtype).min / 2)
                found = self._tables[future, past] = PositionTable(F.pad(keys, (0, 1)), shared)
            return found

    def step(self, stage: LayerStage, frames: Tensor, rows: Rows, visible: Visible) -> Tensor:
        """Take arriving frames [R, Q, D] of some rows, return as many emitted ones; the stage advances."""
        shape = frames.shape
        frames = frames.reshape(-1, self.width)
        frames = self.first(self.norm_first(frames)).add_(frames)
        projected = self.projections(self.norm_attention(frames))
        new = projected.view(*shape[:2], 3, self.heads, self.head_width)[:, :, 1:]
        keys_values = _store(stage.keys_values, new, rows, visible.slots)
        query = projected[:, : self.width]
        if stage.waiting.shape[1]:
            frames, query = (
                _exchange(waiting, each.reshape(shape), rows)[:, : shape[1]].reshape(-1, self.width)
                for waiting, each in ((stage.waiting, frames), (stage.queries, query))
            )
        frames = self._attend(query, keys_values, visible, stage.table).add_(frames)
        frames = self._convolve(stage.convolution, frames, shape, rows, visible.began).add_(frames)
        frames = self.second(self.norm_second(frames)).add_(frames)
        frames = self.norm_out(frames).view(shape)
        for adapter in self.adapters:
            frames = frames + adapter(frames)
        return frames

    def _attend(self, query: Tensor, keys_values: list[Tensor], visible: Visible, positions: PositionTable) -> Tensor:
        """Return the attention's output of scaled queries with their bias, both [R * Q, D]."""
        (keys, values), ages, rows = keys_values, visible.ages, len(keys_values[0])
        count = query.shape[0] // rows
        by_heads = query.view(rows * count, self.heads, self.head_width).transpose(0, 1)
        by_position = torch.baddbmm(positions.shared, by_heads, positions.keys).view(self.heads, rows, count, -1)
        if ages.shape[:-1] == (1,):
            by_slot = by_position.index_select(3, ages[0]).transpose(0, 1)  # [R, H, Q, S]
        else:
            by_slot = by_position.gather(3, ages.expand(self.heads, rows, count, -1)).transpose(0, 1)
        if rows == 1:  # in fewer calls
            scores = torch.baddbmm(by_slot[0], by_heads, keys[0].transpose(1, 2))
            attended = torch.bmm(torch.softmax(scores, -1), values[0]).unsqueeze(0)
        else:
            query = query.view(rows, count, self.heads, self.head_width).transpose(1, 2)  # [R, H, Q, K]
            scores = torch.matmul(query, keys.transpose(2, 3)).add_(by_slot)
            attended = torch.matmul(torch.softmax(scores, -1), values)
        return self.out(attended.transpose(1, 2).reshape(-1, self.width))

    def _convolve(self, kept: Tensor, frames: Tensor, shape: Any, rows: Rows, began: Tensor | None) -> Tensor:
        """Return the convolution module's output, [R * Q, D] like its input; ``kept`` [B, ...] moves on."""
        inner = F.glu(self.pointwise1(self.norm_convolution(frames)), -1).view(shape)
        if began is not None:
            inner = inner * began
        window = _exchange(kept, inner, rows)
        count = shape[1]
        if count == 1 and shape[0] < FEW:
            mixed = (window * self.taps).sum(1).add_(self.tap_bias)
        else:
            mixed = torch.addcmul(self.tap_bias, window[:, :count], self.taps[0])
            for tap in range(1, len(self.taps)):
                mixed.addcmul_(window[:, tap : tap + count], self.taps[tap])
            mixed = mixed.view(-1, self.width)
        return self.pointwise2(F.silu(self.convolution_norm(mixed), inplace=True))


def enabled_adapters(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the adapters of a layer that are enabled now."""
    return [layer.adapter_layer[name] for name in layer.get_enabled_adapters()] if layer.is_adapter_available() else []


def _norm(norm: torch.nn.LayerNorm) -> Callable[..., Tensor]:
    weight, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
    return partial(torch.layer_norm, normalized_shape=norm.normalized_shape, weight=weight, bias=bias, eps=norm.eps)


def _convolution_norm(convolution: torch.nn.Module) -> Callable[..., Tensor]:
    """Return the norm after the convolution as a function of [N, D]."""
    norm = convolution.batch_norm
    if convolution.norm_type == 'layer_norm':
        return _norm(norm)
    scale, shift = norm.weight.detach().clone(), norm.bias.detach().clone()
    if convolution.norm_type == 'batch_norm':  # another one is fused with its statistics
        scale = scale * torch.rsqrt(norm.running_var + norm.eps)
        shift = shift - norm.running_mean * scale
    return lambda frames: torch.addcmul(shift, frames, scale)


def _store(kept: Tensor, new: Tensor, rows: Rows, slots: Tensor) -> list[Tensor]:
    """Write keys and values [R, Q, 2, H, K] to slots of ``kept``; return the rows', [R, H, S, K] each."""
    if rows.index is None and slots.dim() == 1:
        if rows.computes_idle:
            new[rows.idle] = kept[rows.idle[:, None], :, :, slots]
        kept.index_copy_(3, slots, new.permute(0, 2, 3, 1, 4))
    else:
        if rows.computes_idle:
            new, slots = (each.index_select(0, rows.moving) for each in (new, slots))
        kept[rows.moving[:, None], :, :, slots] = new
    return [rows.select(each) for each in kept.unbind(1)]


def _exchange(waiting: Tensor, new: Tensor, rows: Rows) -> Tensor:
    """Return what waits with new frames [R, Q, D] after it; as many as are new no longer wait."""
    joined = torch.cat((rows.select(waiting), new), 1)
    rows.store(waiting, joined[:, new.shape[1] :])
    return joined
