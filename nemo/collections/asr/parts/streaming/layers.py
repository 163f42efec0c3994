# SPDX-License-Identifier: Apache-2.0
"""Conformer layers for many live streams at once, with cached keys, values and projected positions.

NeMo's layer projects the keys, values and positions of its whole cache in each step. Here they are projected once: the key
of frame j lies at slot j % S of a ring.

A layer with a look-ahead of r frames has two halves: frames *arrive* (first feed-forward, query, key and value), wait, and are
*emitted* r frames later (attention, convolution, second feed-forward). Positions before a stream's first go through all
layers like others, but no query sees them and they leave nothing in the convolution.

Shapes: B streams, R rows of them, Q frames of a push, D the encoder's width, H heads, K width of a head, S slots of a ring,
P positions.
"""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nemo.collections.asr.parts.streaming.linear import PreparedLinear
from nemo.collections.asr.parts.streaming.ring_buffers import GROWTH, SHRINKS_AT, RingWindow, Rows, Stage, Visible
from nemo.collections.asr.parts.submodules.batchnorm import FusedBatchNorm1d
from nemo.collections.asr.parts.submodules.causal_convs import CausalConv1D
from nemo.collections.asr.parts.submodules.conformer_modules import (
    ConformerConvolution,
    ConformerFeedForward,
    ConformerLayer,
)
from nemo.collections.asr.parts.submodules.multi_head_attention import RelPositionMultiHeadAttention
from nemo.collections.asr.parts.utils.activations import Swish
from nemo.collections.common.parts.adapter_modules import LinearAdapter
from nemo.core.classes.mixins.adapter_mixin_strategies import ResidualAddAdapterStrategy

HIDDEN = -10000.0  # a score, as NeMo's; finite, so that a frame without visible slots is not NaN
FEW = 8  # frames up to which the convolution is faster as one sum
FEED_FORWARD = {
    '': ConformerFeedForward,
    'linear1': nn.Linear,
    'activation': Swish,
    'dropout': nn.Dropout,
    'linear2': nn.Linear,
}
PARTS = {  # of a layer: the modules whose computation is repeated here
    '': ConformerLayer,
    **{f'norm_{name}': nn.LayerNorm for name in ('feed_forward1', 'self_att', 'conv', 'feed_forward2', 'out')},
    **{f'feed_forward{half}.{name}'.rstrip('.'): kind for half in '12' for name, kind in FEED_FORWARD.items()},
    'self_attn': RelPositionMultiHeadAttention,
    **{f'self_attn.linear_{name}': nn.Linear for name in ('q', 'k', 'v', 'out', 'pos')},
    'self_attn.dropout': nn.Dropout,
    'conv': ConformerConvolution,
    'conv.pointwise_conv1': nn.Conv1d,
    'conv.depthwise_conv': CausalConv1D,
    'conv.activation': Swish,
    'conv.pointwise_conv2': nn.Conv1d,
    'dropout': nn.Dropout,
}
NORMS = {'layer_norm': nn.LayerNorm, 'batch_norm': nn.BatchNorm1d, 'fused_batch_norm': FusedBatchNorm1d}


@dataclass(eq=False)
class PositionTable:
    """What a layer's queries score of relative positions, from the farthest ahead to the farthest behind."""

    keys: torch.Tensor
    """[H, K, P]."""
    shared: torch.Tensor
    """Scores that all queries share, [H, 1, P]."""

    def bytes(self) -> int:
        """Return how many bytes it takes."""
        return self.keys.nbytes + self.shared.nbytes


class LayerStage(Stage):
    """What one layer keeps of all streams.

    Args:
        batch: B.
        layer: whose.
        window: of its ring; without a limit its ring grows.
        behind: frames that wait in the layers before.
        count: frames pushed through all layers, those included that wait before this one, [B]; all layers share it.
    """

    def __init__(self, batch: int, layer: 'PreparedLayer', window: RingWindow, behind: int, count: np.ndarray):
        like = dict(dtype=layer.taps.dtype, device=layer.taps.device)
        self.window, self.behind, self.count = window, behind, count
        self.keys_values = torch.zeros(batch, 2, layer.heads, window.slots, layer.head_width, **like)
        self.convolution = torch.zeros(batch, len(layer.taps) - 1, layer.width, **like)
        self.waiting, self.queries = (torch.zeros(batch, window.wait, layer.width, **like) for _ in range(2))

    def reserve(self, needed: int) -> None:
        """Give a ring without a limit as many slots as frames; far too many are given back."""
        slots = now = self.window.slots
        if not self.window.is_unlimited or now // SHRINKS_AT < needed <= now:
            return
        while slots < needed:
            slots *= 2
        while slots // 2 >= max(needed, GROWTH):
            slots //= 2
        if slots > now:
            self.keys_values = F.pad(self.keys_values, (0, 0, 0, slots - now))
        elif slots < now:
            self.keys_values = self.keys_values[:, :, :, :slots].clone()
        self.window = self.window.resized(slots)

    def reset(self, rows: list[int], counts: bool = True) -> None:
        """Set all that some rows hold to 0."""
        super().reset(rows, counts)
        self.reserve(self.frames())

    def frames(self) -> int:
        """Return how many frames the longest stream has in this layer."""
        return max(int(self.count.max()) - self.behind, 0)

    def export(self, row: int) -> dict:
        """Return a copy of a row; of a ring without a limit the slots in use."""
        state = super().export(row)
        if self.window.is_unlimited:
            state['keys_values'] = state['keys_values'][:, :, : max(state['count'] - self.behind, 0)].clone()
        return state

    def shape(self, name: str, value: torch.Tensor, state: dict) -> tuple[int, ...]:
        """Return the shape of a row's tensor in a state."""
        if name == 'keys_values' and self.window.is_unlimited:
            return (*value.shape[:2], max(state['count'] - self.behind, 0), value.shape[3])
        return value.shape

    def load(self, row: int, state: dict) -> None:
        """Replace a row by an exported state, which has been checked."""
        given = state['keys_values']
        if self.window.is_unlimited:
            self.reserve(max(self.frames(), given.shape[2]))  # other streams may have more frames
            given = F.pad(given, (0, 0, 0, self.window.slots - given.shape[2]))
        super().load(row, {**state, 'keys_values': given})


class _Norm:
    """A layer norm of fixed weights."""

    def __init__(self, norm: torch.nn.LayerNorm):
        self.arguments = norm.normalized_shape, norm.weight.detach().clone(), norm.bias.detach().clone(), norm.eps

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(frames, *self.arguments)


class PreparedLayer:
    """A copy of the weights of one ``ConformerLayer`` in eval mode, arranged for live streams; shared by all sessions.

    Args:
        layer: the layer, with the adapters that are enabled now.
        precision: of its linear layers, see :class:`PreparedLinear`.
    """

    def __init__(self, layer: torch.nn.Module, precision: str = 'float32'):
        attention, convolution = layer.self_attn, layer.conv
        self.heads, self.head_width = attention.h, attention.d_k
        self.width = self.heads * self.head_width
        scale = 1 / attention.s_d_k
        self.norm_first, self.norm_second = _Norm(layer.norm_feed_forward1), _Norm(layer.norm_feed_forward2)
        self.norm_attention, self.norm_convolution = _Norm(layer.norm_self_att), _Norm(layer.norm_conv)
        self.norm_out = _Norm(layer.norm_out)
        linear = partial(PreparedLinear, precision=precision)
        self.first = _feed_forward(layer.feed_forward1, layer.fc_factor, linear)
        self.second = _feed_forward(layer.feed_forward2, layer.fc_factor, linear)
        self.projections = _joined(
            [attention.linear_q, attention.linear_k, attention.linear_v], [scale, 1.0, 1.0], linear
        )  # query, key and value in one product
        self.out = linear(attention.linear_out.weight, attention.linear_out.bias)
        self.position_weight = attention.linear_pos.weight.detach().clone()
        self.bias_u, self.bias_v = (
            (bias.detach() * scale).flatten() for bias in (attention.pos_bias_u, attention.pos_bias_v)
        )
        self.pointwise1 = linear(convolution.pointwise_conv1.weight, convolution.pointwise_conv1.bias)
        self.pointwise2 = linear(convolution.pointwise_conv2.weight, convolution.pointwise_conv2.bias)
        depthwise = convolution.depthwise_conv
        self.taps = depthwise.weight.detach()[:, 0].t().clone(memory_format=torch.contiguous_format)  # [kernel, D]
        self.tap_bias = torch.zeros_like(self.taps[0]) if depthwise.bias is None else depthwise.bias.detach().clone()
        self.convolution_norm = _convolution_norm(convolution)
        self.adapters = [copy.deepcopy(adapter.module) for adapter in _enabled_adapters(layer).values()]

    def positions(self, embeddings: torch.Tensor) -> PositionTable:
        """Return the keys [H, K, P] and the shared scores [H, 1, P] of relative positions from embeddings [P, D]."""
        keys = F.linear(embeddings.to(self.position_weight.dtype), self.position_weight)
        keys = keys.view(-1, self.heads, self.head_width).permute(1, 2, 0).contiguous()
        return PositionTable(keys, torch.bmm(self.bias_v.view(self.heads, 1, self.head_width), keys))

    def arrive(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames behind the first feed-forward [N, D], and queries, keys and values [N, 3 * D], for frames [N, D]."""
        frames = _apply(self.first, self.norm_first(frames)).add_(frames)
        return frames, self.projections(self.norm_attention(frames))

    def step(
        self, stage: LayerStage, frames: torch.Tensor, rows: Rows, visible: Visible, positions: PositionTable
    ) -> torch.Tensor:
        """Take frames that arrive, and return as many that are emitted, [R, Q, D].

        Args:
            stage: what the layer keeps; changes in place.
            frames: [R, Q, D].
            rows: which streams.
            visible: what is seen.
            positions: of :meth:`positions`.
        """
        shape = frames.shape
        frames, projected = self.arrive(frames.reshape(-1, self.width))
        keys_values = self.store(
            stage, projected.view(*shape[:2], 3, self.heads, self.head_width), rows, visible.slots
        )
        query = projected[:, : self.width]
        if stage.waiting.shape[1]:
            frames = _exchange(stage.waiting, frames.view(shape), rows).reshape(-1, self.width)
            query = _exchange(stage.queries, query.reshape(shape), rows).reshape(-1, self.width)
        frames = self._attend(query, keys_values, shape[1], visible, positions).add_(frames)
        frames = self._convolve(stage, frames, shape, rows, visible.began).add_(frames)
        frames = _apply(self.second, self.norm_second(frames)).add_(frames)
        frames = self.norm_out(frames).view(shape)
        for adapter in self.adapters:
            frames = frames + adapter(frames)
        return frames

    def store(self, stage: LayerStage, projected: torch.Tensor, rows: Rows, slots: torch.Tensor) -> torch.Tensor:
        """Write keys and values of what was projected [R, Q, 3, H, K] to their slots; returns all, [R, 2, H, S, K]."""
        kept, places, new = stage.keys_values, slots, projected[:, :, 1:]
        if rows.is_whole and slots.dim() == 1:
            return kept.index_copy_(3, slots, new.permute(0, 2, 3, 1, 4))
        if rows.computes_idle:
            idle = rows.idle[:, None]
            places = slots if slots.dim() == 1 else slots.index_select(0, rows.idle)
            before = kept[idle, :, :, places]
        if rows.index is None and slots.dim() == 1:
            kept.index_copy_(3, slots, new.permute(0, 2, 3, 1, 4))
        else:
            index = torch.arange(len(new), device=new.device) if rows.index is None else rows.index
            kept[index[:, None], :, :, slots] = new
        if rows.computes_idle:
            kept[idle, :, :, places] = before
        return rows.select(kept)

    def _attend(self, query, keys_values, count: int, visible: Visible, positions: PositionTable) -> torch.Tensor:
        """Return the attention's output of scaled queries, both [R * Q, D]."""
        rows = keys_values.shape[0]
        by_heads = (rows * count, self.heads, self.head_width)
        by_position = torch.baddbmm(
            positions.shared, query.view(by_heads).transpose(0, 1), positions.keys
        )  # [H, R * Q, P]
        by_position = _of_ages(by_position.view(self.heads, rows, count, -1), visible.ages)
        query = (query + self.bias_u).view(rows, count, *by_heads[1:]).transpose(1, 2)  # [R, H, Q, K]
        keys, values = keys_values.unbind(1)
        if rows == 1:
            return self._attend_alone(query[0], keys[0], values[0], by_position[:, 0], visible.hidden)
        scores = torch.matmul(query, keys.transpose(2, 3)).add_(by_position.transpose(0, 1))
        if visible.hidden is not None:
            scores.masked_fill_(visible.hidden, HIDDEN)
        attended = torch.matmul(torch.softmax(scores, -1), values)
        return self.out(attended.transpose(1, 2).reshape(-1, self.width))

    def _attend_alone(self, query, keys, values, by_position, hidden) -> torch.Tensor:
        """The same for one stream, in fewer calls: query [H, Q, K], keys and values [H, S, K], scores [H, Q, S]."""
        scores = torch.baddbmm(by_position, query, keys.transpose(1, 2))
        if hidden is not None:
            scores.masked_fill_(hidden[0], HIDDEN)
        attended = torch.bmm(torch.softmax(scores, -1), values)
        return self.out(attended.transpose(0, 1).reshape(-1, self.width))

    def _convolve(self, stage: LayerStage, frames: torch.Tensor, shape, rows: Rows, began) -> torch.Tensor:
        """Return the convolution module's output, [R * Q, D] like its input."""
        count = shape[1]
        inner = F.glu(self.pointwise1(self.norm_convolution(frames)), -1).view(shape)
        if began is not None:
            inner = inner * began
        kept = stage.convolution
        window = torch.cat((kept if rows.is_whole else rows.select(kept), inner), 1)
        if rows.is_whole:
            kept.copy_(window[:, count:])
        else:
            rows.store(kept, window[:, count:])
        if count == 1 and shape[0] < FEW:
            mixed = (window * self.taps).sum(1).add_(self.tap_bias)
        else:
            mixed = torch.addcmul(self.tap_bias, window[:, :count], self.taps[0])
            for tap in range(1, len(self.taps)):
                mixed.addcmul_(window[:, tap : tap + count], self.taps[tap])
            mixed = mixed.view(-1, self.width)
        return self.pointwise2(F.silu(self.convolution_norm(mixed), inplace=True))


def why_not(layer: nn.Module) -> str | None:
    """Return which part of a layer live streams do not compute, or None."""
    modules = dict(layer.named_modules(remove_duplicate=False))  # feed-forwards share their activation
    for name, kind in {**PARTS, 'conv.batch_norm': NORMS[layer.conv.norm_type]}.items():
        module, place = modules.get(name), f'.{name}' if name else ''
        if module is None:
            return f'{place} is missing'
        if type(module).forward is not kind.forward or 'forward' in vars(module):
            return f'{place} is a {type(module).__name__} that is not computed as {kind.__name__}'
    hooked = [name for name, module in modules.items() if has_hooks(module)]
    if hooked:
        return f"{'.' if hooked[0] else ''}{hooked[0]} has forward hooks"
    if layer.conv.pointwise_activation != 'glu_':
        return '.conv.pointwise_activation is not glu_'
    for name, adapter in _enabled_adapters(layer).items():
        strategy = getattr(adapter, 'adapter_strategy', None)
        kinds = type(adapter).forward, type(strategy).forward if strategy is not None else None
        if kinds != (LinearAdapter.forward, ResidualAddAdapterStrategy.forward):
            return f'.adapter_layer.{name} is a {type(adapter).__name__}; only added linear adapters are computed'
    if layer.is_access_enabled(getattr(layer, 'model_guid', None)):
        return ': its outputs are registered for access'
    return None


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module's forward runs hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _enabled_adapters(layer: nn.Module) -> dict[str, nn.Module]:
    names = layer.get_enabled_adapters() if layer.is_adapter_available() else []
    return {name: layer.adapter_layer[name] for name in names}


def _feed_forward(module, scale: float, linear) -> tuple[PreparedLinear, PreparedLinear]:
    return (
        linear(module.linear1.weight, module.linear1.bias),
        linear(module.linear2.weight, module.linear2.bias, scale),
    )


def _apply(feed_forward: tuple[PreparedLinear, PreparedLinear], frames: torch.Tensor) -> torch.Tensor:
    inner, outer = feed_forward
    return outer(F.silu(inner(frames), inplace=True))


def _joined(linears: list, scales: list[float], linear) -> PreparedLinear:
    """Return several linear layers of the same input as one."""
    weight = torch.cat([each.weight.detach() * scale for each, scale in zip(linears, scales)])
    if linears[0].bias is None:
        return linear(weight)
    bias = torch.cat([each.bias.detach() * scale for each, scale in zip(linears, scales)])
    return linear(weight, bias)


def _convolution_norm(convolution):
    """Return the norm behind the convolution as a function of [N, D]."""
    norm = convolution.batch_norm
    if convolution.norm_type == 'layer_norm':
        return _Norm(norm)
    if convolution.norm_type == 'batch_norm':
        scale = torch.rsqrt(norm.running_var + norm.eps) * norm.weight.detach()
        shift = norm.bias.detach() - norm.running_mean * scale
    else:  # fused with its statistics
        scale, shift = norm.weight.detach().clone(), norm.bias.detach().clone()
    return lambda frames: torch.addcmul(shift, frames, scale)


def _exchange(waiting: torch.Tensor, new: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Put new frames [R, Q, D] behind those that wait, and return as many from their front."""
    joined = torch.cat((rows.select(waiting), new), 1)
    count = new.shape[1]
    rows.store(waiting, joined[:, count:])
    return joined[:, :count]


def _of_ages(scores: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Return the scores of positions [H, R, Q, P] in the order of the slots, [H, R, Q, S]."""
    if ages.dim() == 2 and ages.shape[0] == 1:
        return scores.index_select(3, ages[0])
    ages = ages if ages.dim() == 3 else ages.unsqueeze(0)
    return scores.gather(3, ages.unsqueeze(0).expand(*scores.shape[:3], -1))
