# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Patch of NeMo's ``quantizers.py``: the same tokens and codes by matrix products, in bounded memory.

Shapes: B batch, D features, T frames, S target frames (T // combine_time_steps), K code dimensions, C classes,
H codebooks, N frames of the whole batch (B * S).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from nemo.core.classes import typecheck
from nemo_streaming_ssl import upstream

_up = upstream(globals())

# Scores held at a time. 2 ** 20 in float64 are 8 MB, which stay in a CPU's cache; a GPU wants fewer and larger kernels.
SCORES_AT_A_TIME_ON_CPU = 2**20
SCORES_AT_A_TIME = 2**24


class RandomProjectionVectorQuantizer(_up.RandomProjectionVectorQuantizer):
    """BEST-RQ's targets (https://arxiv.org/abs/2202.01855); arguments, weights and results are NeMo's.

    NeMo compares each frame with each code by a difference [B, S, H, K, C]. The nearest code is also the one with the
    largest x . c - |c|^2 / 2, a matrix product.
    """

    @typecheck()
    def forward(self, input_signal):
        """Return the nearest codes and their indices.

        Frames beyond a multiple of ``combine_time_steps`` are left out, where NeMo fails.

        Args:
            input_signal: [B, D, T], or [B, T, D] with ``time_ahead``; any floating dtype.

        Returns:
            xq: codes [B, K, S, H], or [B, S, K, H] with ``time_ahead``; in the codebooks' dtype.
            xid: tokens [B, S, H] int64. One codebook is squeezed with ``squeeze_single``. With several codebooks NeMo
                orders the elements of ``xq`` by codebook before frame; so do these.
        """
        signal = input_signal if self.time_ahead else input_signal.transpose(1, 2)
        batch, frames, features = signal.shape
        targets = frames // self.combine_time_steps
        whole = signal[:, : targets * self.combine_time_steps]
        combined = whole.reshape(batch, targets, self.combine_time_steps * features)
        projected = self.proj(combined).view(batch, targets, self.num_books, self.code_dim)
        tokens = self._tokens(F.normalize(projected, dim=-1))

        in_all_books = tokens + self.num_classes * torch.arange(self.num_books, device=tokens.device)
        codes = F.embedding(in_all_books.transpose(1, 2), self.codebooks.view(-1, self.code_dim))
        codes = codes.view(batch, targets, self.code_dim, self.num_books)
        if not self.time_ahead:
            codes = codes.transpose(1, 2)
        if self.num_books == 1 and self.squeeze_single:
            return codes.squeeze(-1), tokens.squeeze(-1)
        return codes, tokens

    @torch.no_grad()
    def _tokens(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the index of the code nearest to each frame [B, S, H, K], as [B, S, H]."""
        # NeMo's differences are in the wider dtype of frames and codebooks, whatever autocast says. Its cosine fails
        # where the two dtypes differ, or rounds to autocast's; here both distances are computed alike.
        dtype = torch.promote_types(frames.dtype, self.codebooks.dtype)
        device = frames.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            books = [
                self._nearest(frames[:, :, book].flatten(0, 1).to(dtype), self.codebooks[book].to(dtype))
                for book in range(self.num_books)
            ]
        return torch.stack(books, dim=-1).view(*frames.shape[:3])

    def _nearest(self, frames: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the index of the nearest of codes [C, K] for each frame [N, K]; [N] int64."""
        on_cpu = frames.device.type == 'cpu'
        chunk = max(1, (SCORES_AT_A_TIME_ON_CPU if on_cpu else SCORES_AT_A_TIME) // codes.shape[0])
        norms = codes.t().contiguous().norm(dim=0)
        bias = torch.zeros_like(norms) if self.dist_fn == 'cosine' else norms.square() / -2
        tokens = torch.cat([torch.addmm(bias, part, codes.t()).argmax(dim=1) for part in frames.split(chunk)])
        if self.dist_fn == 'cosine':
            return tokens
        # All codes have norm 1 but for rounding, and that decides where a frame is silence, exactly zero. The squares of
        # nearly equal norms are equal: compare the norms themselves, as NeMo does.
        return torch.where((frames == 0).all(dim=1), norms.argmin(), tokens)
