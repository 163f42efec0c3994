# SPDX-License-Identifier: Apache-2.0
"""Conformer layers for many live streams at once, with cached keys, values and projected positions.

NeMo's layer projects the keys, values and positions of its whole cache anew in each step. Here they are projected once: key j
of a stream lies at slot j % S of a ring; which frame a slot holds, and whether a query sees it, follows from how many
frames have arrived. So a stream begins anew by its count alone.

A layer with a look-ahead of r frames has two halves: frames *arrive* (first feed-forward, query, key and value), wait, and are
*emitted* r frames later (attention, convolution, second feed-forward). Positions before a stream's first go through all
layers like others, but are seen by nobody and leave nothing in the convolution.

Shapes: R rows (streams), Q frames of a step, D the encoder's width, H heads, K width of a head, S slots of a ring, P positions.
"""

import weakref
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from nemo.collections.asr.parts.streaming.linear import PreparedLinear
from nemo.collections.asr.parts.streaming.rings import LayerRings

HIDDEN = -10000.0  # a score, as NeMo's; finite, so that a frame that sees nothing is not NaN
FEW = 8  # frames up to which the convolution is faster as one sum


@dataclass
class Visible:
    """What the queries of a step see; the same for all layers of one context that have received as much."""

    slots: torch.Tensor
    """Where the frames that arrive are written, [Q], or [R, Q] of rows in different places."""
    ages: torch.Tensor
    """Row of the positions' table for each query and slot, [Q, S] or [R, Q, S] int64."""
    hidden: torch.Tensor | None
    """What is not seen, broadcast to [R, H, Q, S] bool; None: all is."""
    began: torch.Tensor | None
    """Whether an emitted frame is one of its stream, [R or 1, Q, 1] bool; None: all are."""


class _Norm:
    """A layer norm of fixed weights."""

    def __init__(self, norm: torch.nn.LayerNorm):
        self.arguments = norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(frames, *self.arguments)


class PreparedLayer:
    """The weights of one ``ConformerLayer`` in eval mode, arranged for live streams; shared by all sessions.

    Args:
        layer: the layer; its adapters are called where they are.
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
        self.position_weight = attention.linear_pos.weight.detach()
        self.bias_u, self.bias_v = (
            (bias.detach() * scale).flatten() for bias in (attention.pos_bias_u, attention.pos_bias_v)
        )
        self.pointwise1 = linear(convolution.pointwise_conv1.weight, convolution.pointwise_conv1.bias)
        self.pointwise2 = linear(convolution.pointwise_conv2.weight, convolution.pointwise_conv2.bias)
        depthwise = convolution.depthwise_conv
        self.taps = depthwise.weight.detach()[:, 0].t().contiguous()  # [kernel, D]
        self.tap_bias = torch.zeros_like(self.taps[0]) if depthwise.bias is None else depthwise.bias.detach()
        self.convolution_norm = _convolution_norm(convolution)
        self._adapted = weakref.ref(layer) if layer.is_adapter_available() else None  # it knows its encoder

    def new_rings(self, batch: int, slots: int, waits: int) -> LayerRings:
        """Return the state before the first frame.

        Args:
            batch: B.
            slots: S.
            waits: r, frames of look-ahead.
        """
        like = dict(dtype=self.taps.dtype, device=self.taps.device)
        return LayerRings(
            torch.zeros(batch, 2, self.heads, slots, self.head_width, **like),
            torch.zeros(batch, len(self.taps) - 1, self.width, **like),
            *(torch.zeros(batch, waits, self.width, **like) for _ in range(2)),
        )

    def positions(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys [H, K, P] and the shared scores [H, 1, P] of relative positions from embeddings [P, D]."""
        keys = F.linear(embeddings.to(self.position_weight.dtype), self.position_weight)
        keys = keys.view(-1, self.heads, self.head_width).permute(1, 2, 0).contiguous()
        return keys, torch.bmm(self.bias_v.view(self.heads, 1, self.head_width), keys)

    def arrive(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames behind the first feed-forward [N, D], and queries, keys and values [N, 3 * D], for frames [N, D]."""
        frames = _apply(self.first, self.norm_first(frames)).add_(frames)
        return frames, self.projections(self.norm_attention(frames))

    def step(
        self,
        rings: LayerRings,
        frames: torch.Tensor,
        rows: torch.Tensor | None,
        visible: Visible,
        positions: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Take frames that arrive, and return as many that are emitted, [R, Q, D].

        Args:
            rings: the layer's state; changes in place.
            frames: [R, Q, D].
            rows: which streams of the rings these are, [R]; None: all.
            visible: what is seen.
            positions: of :meth:`positions`.
        """
        shape = frames.shape
        frames, projected = self.arrive(frames.reshape(-1, self.width))
        keys_values = self.store(
            rings, projected.view(*shape[:2], 3, self.heads, self.head_width), rows, visible.slots
        )
        query = projected[:, : self.width]
        if rings.waiting.shape[1]:
            frames = _exchange(rings.waiting, frames.view(shape), rows).reshape(-1, self.width)
            query = _exchange(rings.queries, query.reshape(shape), rows).reshape(-1, self.width)
        frames = self._attend(query, keys_values, shape[1], visible, positions).add_(frames)
        frames = self._convolve(rings, frames, shape, rows, visible.began).add_(frames)
        frames = _apply(self.second, self.norm_second(frames)).add_(frames)
        frames = self.norm_out(frames).view(shape)
        if self._adapted is not None:
            frames = self._adapted().forward_enabled_adapters({'x': frames, 'loc': 'post'})['x']
        return frames

    def store(self, rings: LayerRings, projected: torch.Tensor, rows, slots: torch.Tensor) -> torch.Tensor:
        """Write keys and values of what was projected [R, Q, 3, H, K] to their slots; returns all, [R, 2, H, S, K]."""
        if rows is None and slots.dim() == 1:
            new = projected[:, :, 1:].permute(0, 2, 3, 1, 4)
            rings.keys_values.index_copy_(3, slots, new)
            return rings.keys_values
        slots = slots if slots.dim() == 2 else slots.expand(projected.shape[0], -1)
        index = torch.arange(projected.shape[0], device=projected.device) if rows is None else rows
        rings.keys_values[index[:, None], :, :, slots] = projected[:, :, 1:]
        return rings.keys_values if rows is None else rings.keys_values[rows]

    def _attend(self, query, keys_values, count: int, visible: Visible, positions) -> torch.Tensor:
        """Return the attention's output of scaled queries, both [R * Q, D]."""
        rows = keys_values.shape[0]
        by_heads = (rows * count, self.heads, self.head_width)
        keys, shared = positions
        by_position = torch.baddbmm(shared, query.view(by_heads).transpose(0, 1), keys)  # [H, R * Q, P]
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

    def _convolve(self, rings: LayerRings, frames: torch.Tensor, shape, rows, began) -> torch.Tensor:
        """Return the convolution module's output, [R * Q, D] like its input."""
        count = shape[1]
        inner = F.glu(self.pointwise1(self.norm_convolution(frames)), -1).view(shape)
        if began is not None:
            inner = inner * began
        window = torch.cat((rings.convolution if rows is None else rings.convolution[rows], inner), 1)
        if rows is None:
            rings.convolution.copy_(window[:, count:])
        else:
            rings.convolution[rows] = window[:, count:]
        if count == 1 and shape[0] < FEW:
            mixed = (window * self.taps).sum(1).add_(self.tap_bias)
        else:
            mixed = torch.addcmul(self.tap_bias, window[:, :count], self.taps[0])
            for tap in range(1, len(self.taps)):
                mixed.addcmul_(window[:, tap : tap + count], self.taps[tap])
            mixed = mixed.view(-1, self.width)
        return self.pointwise2(F.silu(self.convolution_norm(mixed), inplace=True))


def why_not(layer: torch.nn.Module) -> str | None:
    """Return why a layer cannot be run in this way, or None."""
    convolution = layer.conv
    if convolution.pointwise_activation != 'glu_':
        return 'its convolution has another activation than glu'
    for activation in (layer.feed_forward1.activation, layer.feed_forward2.activation, convolution.activation):
        if not isinstance(activation, torch.nn.SiLU):
            return f'its activation is {type(activation).__name__}'
    hooked = [name for name, module in layer.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    if hooked:
        return f"{hooked[0] or 'it'} has forward hooks"
    linears = (layer.feed_forward1.linear1, layer.self_attn.linear_q, layer.self_attn.linear_out)
    if any(type(linear) is not torch.nn.Linear for linear in linears):
        return 'its linear layers are of another kind'
    if layer.is_access_enabled(getattr(layer, 'model_guid', None)):
        return 'its outputs are registered for access'
    return None


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
        scale, shift = norm.weight.detach(), norm.bias.detach()
    return lambda frames: torch.addcmul(shift, frames, scale)


def _exchange(waiting: torch.Tensor, new: torch.Tensor, rows) -> torch.Tensor:
    """Put new frames [R, Q, D] behind those that wait, and return as many from their front."""
    joined = torch.cat((waiting if rows is None else waiting[rows], new), 1)
    count = new.shape[1]
    if rows is None:
        waiting.copy_(joined[:, count:])
    else:
        waiting[rows] = joined[:, count:]
    return joined[:, :count]


def _of_ages(scores: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Return the scores of positions [H, R, Q, P] in the order of the slots, [H, R, Q, S]."""
    if ages.dim() == 2 and ages.shape[0] == 1:
        return scores.index_select(3, ages[0])
    ages = ages if ages.dim() == 3 else ages.unsqueeze(0)
    return scores.gather(3, ages.unsqueeze(0).expand(*scores.shape[:3], -1))
