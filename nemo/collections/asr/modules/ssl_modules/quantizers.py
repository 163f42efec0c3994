# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``quantizers.py``: the same tokens and codes by matrix products, in bounded memory.

Beside NeMo's random projection there is one of principal components.

Shapes: B batch, D features, T frames, S target frames (T // combine_time_steps), K code dimensions, C classes,
H codebooks, N frames of the whole batch (B * S).
"""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F

from nemo.collections.asr.parts.utils.config_keys import Quantizer
from nemo.core.classes import typecheck
from nemo.utils import AppState
from nemo_streaming_ssl import upstream

_up = upstream(globals())

# Scores held at a time: 8 MB of float64 stay in a CPU's cache; a GPU needs fewer and larger kernels.
SCORES_AT_A_TIME_ON_CPU = 2**20
SCORES_AT_A_TIME = 2**24
_SMALLEST_VARIANCE = 1e-10  # of the first component's, below which a component is rounding


class RandomProjectionVectorQuantizer(_up.RandomProjectionVectorQuantizer):
    """BEST-RQ's targets (arXiv 2202.01855); by default arguments, weights and results are NeMo's.

    NeMo compares each frame with each code by a difference [B, S, H, K, C]. The nearest code is also the one with the
    largest ``x . c - |c|^2 / 2``, a matrix product. Projection and distances are at least float32 in any precision.

    Args:
        projection: ``random``, or ``pca``: codebook h sees the principal components h * K ... h * K + K - 1 of the
            combined frames, at unit variance. The checkpoint contains the weights: a restored model reads no file.
        projection_file: what ``compute_feature_stats.py --pca`` wrote; for ``pca`` only.

    Raises:
        ValueError: naming the key of ``model.quantizer``, its value and what is allowed.
    """

    def __init__(self, *args, projection: str = 'random', projection_file: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.projection = projection
        self.projection_normalization: str | None = None
        """What the features must be normalised by, from ``projection_file``; None without one."""
        Quantizer.parse(dict(projection=projection))
        if projection == 'random' and projection_file is not None:
            name = f'{Quantizer.name}.projection_file'
            raise ValueError(f"{name} is {str(projection_file)!r}; with projection random it must be null")
        if projection == 'pca' and not AppState().is_model_being_restored:  # else the weights come with the checkpoint
            shape = self.proj.out_features, self.combine_time_steps, self.feat_in
            weights, self.projection_normalization = _read_projection(projection_file, *shape)
            with torch.no_grad():
                self.proj.weight.copy_(torch.from_numpy(weights))

    @typecheck()
    def forward(self, input_signal):
        """Return the nearest codes and their indices; a remainder of ``combine_time_steps`` is left out.

        Takes features [B, D, T], or [B, T, D] with ``time_ahead``, of any floating dtype.

        Returns:
            the codes ``xq`` [B, K, S, H], or [B, S, K, H] with ``time_ahead``, in the codebooks' dtype, and the tokens
            ``xid`` [B, S, H] int64. One codebook is squeezed with ``squeeze_single``. With several codebooks NeMo orders
            the elements of ``xq`` by codebook before frame; so do these.
        """
        frames = self._unit_vectors(input_signal)
        batch, targets = frames.shape[:2]
        tokens = self._tokens(frames)

        in_all_books = tokens + self.num_classes * torch.arange(self.num_books, device=tokens.device)
        codes = F.embedding(in_all_books.transpose(1, 2), self.codebooks.view(-1, self.code_dim))
        codes = codes.view(batch, targets, self.code_dim, self.num_books)
        if not self.time_ahead:
            codes = codes.transpose(1, 2)
        if self.num_books == 1 and self.squeeze_single:
            return codes.squeeze(-1), tokens.squeeze(-1)
        return codes, tokens

    def _unit_vectors(self, input_signal: torch.Tensor) -> torch.Tensor:
        """Return what codes are compared with, [B, S, H, K], at least float32, of a signal of :meth:`forward`."""
        signal = input_signal if self.time_ahead else input_signal.transpose(1, 2)
        batch, frames, features = signal.shape
        targets = frames // self.combine_time_steps
        whole = signal[:, : targets * self.combine_time_steps]
        combined = whole.reshape(batch, targets, self.combine_time_steps * features)
        weight = self.proj.weight
        dtype = torch.promote_types(torch.promote_types(combined.dtype, weight.dtype), torch.float32)
        with without_autocast(combined.device):
            projected = F.linear(combined.to(dtype), weight.to(dtype))
        return F.normalize(projected.view(batch, targets, self.num_books, self.code_dim), dim=-1)

    @torch.no_grad()
    def _tokens(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the index of the code nearest to each frame [B, S, H, K], as [B, S, H]."""
        dtype = torch.promote_types(frames.dtype, self.codebooks.dtype)
        by_book = frames.flatten(0, 1).to(dtype).unbind(1)
        with without_autocast(frames.device):
            tokens = [self._nearest(*pair) for pair in zip(by_book, self.codebooks.to(dtype), strict=True)]
        return torch.stack(tokens, dim=-1).view(*frames.shape[:3])

    def _nearest(self, frames: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the index of the nearest of codes [C, K] for each frame [N, K]; [N] int64."""
        on_cpu = frames.device.type == 'cpu'
        chunk = max(1, (SCORES_AT_A_TIME_ON_CPU if on_cpu else SCORES_AT_A_TIME) // codes.shape[0])
        norms = codes.norm(dim=1)  # rounded as NeMo's
        bias = torch.zeros_like(norms) if self.dist_fn == 'cosine' else norms.square() / -2
        tokens = torch.cat([torch.addmm(bias, part, codes.t()).argmax(dim=1) for part in frames.split(chunk)])
        if self.dist_fn == 'cosine':
            return tokens
        # All codes have norm 1 but for rounding, and that decides where a frame is silence, exactly zero. The squares of
        # nearly equal norms are equal: compare the norms themselves, as NeMo does.
        return torch.where((frames == 0).all(dim=1), norms.argmin(), tokens)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which operations keep the dtype of their inputs."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _read_projection(path, components: int, combine_time_steps: int, features: int):
    """Read so many principal components of combined frames, those with the largest variance first.

    Returns:
        float64 [components, combine_time_steps * features], features of the first frame first, each component scaled to
        unit variance, and the normalisation of the features, ``per_feature`` or ``NA``.
    """
    name = f'{Quantizer.name}.projection_file {path}'
    try:
        with np.load(path, allow_pickle=False) as file:
            axes, variances = file['components'][:components], file['eigenvalues'][:components]
            made_for = {key: int(file[key]) for key in ('combine_time_steps', 'features')}
            normalization = str(file['normalization'])
    except Exception as error:  # files, zip, NumPy and pickle each have errors of their own
        written = 'what compute_feature_stats.py --pca wrote'
        raise ValueError(f"{name} cannot be read: {error}; with projection pca it must be {written}") from error
    if made_for != dict(combine_time_steps=combine_time_steps, features=features):
        raise ValueError(f"{name} was made for {made_for}; the quantizer has {combine_time_steps} and {features}")
    usable = int(np.sum(variances > _SMALLEST_VARIANCE * variances[0]))
    if usable < components:
        raise ValueError(
            f"{name} has {usable} components with a variance; num_books * code_dim takes {components}: make it with "
            f"--components {components} or more"
        )
    # Unscaled, the first few would decide where a unit vector points, and most codes would never be chosen.
    return axes / np.sqrt(variances)[:, None], normalization
