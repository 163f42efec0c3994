# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``multi_head_attention.py``: contexts by layer, limited ones at linear cost.

Shapes: B batch, H heads, T attention frames, D features of a head, N blocks, C queries of a block, W keys of its
window.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nemo.collections.asr.parts.att_context.blockwise import AttentionBlocks, BlockwiseMask
from nemo.collections.asr.parts.att_context.schedule import parse_own_context
from nemo.utils import avoid_float16_autocast_context
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class MultiHeadAttention(_up.MultiHeadAttention):
    """NeMo's multi-head attention with a context of its own, which its Conformer encoder uses.

    Given a :class:`BlockwiseMask` it computes block by block what NeMo computes from the mask [B, T, T].
    """

    encoder: Any = None
    """The encoder, which keeps the layers' contexts; None: the attention belongs to none."""
    index = 0  # among the encoder's layers
    _built_for = None  # the context of NeMo's local attention

    @property
    def att_context_size(self) -> list[int] | None:
        """The layer's own context ``[left, right]`` in attention frames, or None, as for local attention.

        Setting raises ValueError for what is no context, or one that the encoder's attention does not support.
        """
        if self.encoder is None or self._built_for is not None:
            return self._built_for
        own = self.encoder.layer_att_contexts()[self.index]
        return None if own is None else own.as_list()

    @att_context_size.setter
    def att_context_size(self, value) -> None:
        if self.encoder is None:
            self._built_for = value
            return
        contexts = [own and own.as_list() for own in self.encoder.layer_att_contexts()]
        own = None if value is None else parse_own_context(value, 'self_attention.att_context_size')
        contexts[self.index] = own and own.as_list()
        self.encoder.set_layer_att_context_size(contexts)

    def forward(self, query, key, value, mask, pos_emb=None, cache=None):
        """Attend; arguments and results are NeMo's. The mask may be a :class:`BlockwiseMask`, without a cache.

        ``pos_emb`` is [1, 2 * T - 1, d_model] with relative positions, from the farthest past to the farthest future.
        """
        if not isinstance(mask, BlockwiseMask):
            return super().forward(query, key, value, mask, pos_emb, cache)
        assert cache is None
        if torch.is_autocast_enabled():  # these two as NeMo does
            query, key, value = (tensor.to(torch.float32) for tensor in (query, key, value))
        with avoid_float16_autocast_context():
            query, key, value = (heads.transpose(1, 2) for heads in self.forward_qkv(query, key, value))
            attend = self._attend_in_blocks
            if mask.blocks.are_many and torch.is_grad_enabled():
                drops = self.training and self.dropout_rate > 0
                attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=drops)
            attended = attend(query, key, value, mask, pos_emb)
            # A padded query sees nothing.
            return self.linear_out(attended.flatten(2).masked_fill(mask.padding.unsqueeze(-1), 0.0))

    def _attend_in_blocks(self, query, key, value, mask: BlockwiseMask, pos_emb) -> torch.Tensor:
        """Return the weighted values, [B, T, H, D], of queries, keys and values [B, T, H, D]."""
        blocks = mask.blocks
        query, bias = self._query_and_bias(blocks.queries_of(query), pos_emb, mask.bias.to(key.dtype), blocks)
        query = query.to(key.dtype).unflatten(1, (blocks.count, -1)).permute(0, 3, 1, 2, 4)
        key, value = blocks.windows_of(key), blocks.windows_of(value)
        attend = self._attend_by_sdpa if self.use_pytorch_sdpa else self._attend
        attended = attend(query, key, value, bias.expand(*query.shape[:4], blocks.keys))  # [B, H, N, C, D]
        return attended.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : blocks.frames]

    def _query_and_bias(self, query, pos_emb, bias, blocks: AttentionBlocks):
        """Return the query that meets the keys, [B, N * C, H, D], and what is added to the scaled scores."""
        return query, bias

    def _attend(self, query, key, value, bias) -> torch.Tensor:
        """Return [B, H, N, C, D]: queries of that shape, windows [B, H, N, W, D], a bias [B, H, N, C, W]."""
        queries, keys = (query / self.s_d_k).flatten(0, 2), key.flatten(0, 2)
        scores = torch.baddbmm(bias.flatten(0, 2), queries, keys.transpose(1, 2))
        weights = self.dropout(torch.softmax(scores, dim=-1))
        return torch.matmul(weights, value.flatten(0, 2)).view(query.shape)

    def _attend_by_sdpa(self, query, key, value, bias) -> torch.Tensor:
        """The same by PyTorch's ``scaled_dot_product_attention``, whose kernels take one dimension less."""
        backends = self.use_pytorch_sdpa_backends
        with torch.nn.attention.sdpa_kernel(backends) if backends else nullcontext():
            attended = F.scaled_dot_product_attention(  # type: ignore[misc]
                *(tensor.flatten(0, 1) for tensor in (query, key, value, bias)),
                dropout_p=self.dropout_rate if self.training else 0.0,
                scale=1 / self.s_d_k,
            )
        return attended.view(query.shape)


class RelPositionMultiHeadAttention(MultiHeadAttention, _up.RelPositionMultiHeadAttention):
    """NeMo's multi-head attention with relative positions, with a context of its own."""

    def _query_and_bias(self, query, pos_emb, bias, blocks: AttentionBlocks):
        """The bias becomes [B, H, N, C, W]: only the distances that some query sees are scored at all."""
        centre = pos_emb.shape[1] // 2
        near = pos_emb[:, centre - blocks.past : centre + blocks.future + 1]
        position = self.linear_pos(near).unflatten(-1, (self.h, self.d_k)).permute(0, 2, 3, 1)  # [1, H, D, P]
        position_query = ((query + self.pos_bias_v) / self.s_d_k).transpose(1, 2)
        scores = torch.matmul(position_query, position)  # [B, H, N * C, P]
        return query + self.pos_bias_u, blocks.place(scores) + bias


class RelPositionMultiHeadAttentionLongformer(
    RelPositionMultiHeadAttention, _up.RelPositionMultiHeadAttentionLongformer
):
    """NeMo's local attention, whose context all layers and the positional encoding share."""

    forward = _up.RelPositionMultiHeadAttentionLongformer.forward
