# SPDX-License-Identifier: Apache-2.0
"""All that live streams remember which run as one batch.

Shapes: B streams, N samples, T feature frames, F features (or frequencies), C channels, D the encoder's width, H heads, S slots
of a ring, K width of a head, r frames of look-ahead.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from nemo.collections.asr.parts.streaming.state import copy_tensors

VERSION = 4  # of what BatchedState.to_dict returns; those below are StreamState's
COUNTS = ('received', 'featured', 'frames')


@dataclass
class LayerRings:
    """What one layer remembers of all streams."""

    keys_values: torch.Tensor
    """[B, 2, H, S, K]."""
    convolution: torch.Tensor
    """Inputs of the convolution, [B, kernel - 1, D]."""
    waiting: torch.Tensor
    """Frames that arrived and wait for their right context, [B, r, D]."""
    queries: torch.Tensor
    """Their queries, [B, r, D]."""


@dataclass
class BatchedState:
    """All that live streams remember between samples and encoder frames."""

    received: np.ndarray
    """Samples that each stream has received, [B] int64."""
    featured: np.ndarray
    """Feature frames computed of each, [B] int64."""
    frames: np.ndarray
    """Encoder frames that each has pushed, [B] int64."""
    samples: torch.Tensor
    """Rings of samples, [B, N]."""
    features: torch.Tensor
    """Rings of features, [B, T, F]; frame t at t % T."""
    subsampling: list[torch.Tensor]
    """The last row before each convolution, [B, 1, F, C] each."""
    layers: list[LayerRings] = field(default_factory=list)
    """Of each layer."""
    ended: list[bool] = field(default_factory=list)
    """For each stream, whether it has ended."""

    def to_dict(self) -> dict:
        """Return a copy as plain containers and tensors, for torch.save or pickle."""
        plain = {**vars(self), 'layers': [vars(rings) for rings in self.layers]}
        plain.update({name: torch.from_numpy(getattr(self, name)) for name in COUNTS})
        return {'version': VERSION, **copy_tensors(plain)}

    @classmethod
    def from_dict(cls, state: dict, device) -> 'BatchedState':
        """Return a copy of what :meth:`to_dict` returned, its tensors on a device."""
        counts = {name: state[name].numpy().copy() for name in COUNTS}
        names = ('samples', 'features', 'subsampling', 'layers', 'ended')
        rest = copy_tensors({name: state[name] for name in names}, device)
        layers = [LayerRings(**rings) for rings in rest.pop('layers')]
        return cls(**counts, **rest, layers=layers)

    def bytes(self) -> int:
        """Return how many bytes its tensors take."""
        kept = [self.samples, self.features, *self.subsampling]
        kept += [tensor for rings in self.layers for tensor in vars(rings).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)
