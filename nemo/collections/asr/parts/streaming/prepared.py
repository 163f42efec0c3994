# SPDX-License-Identifier: Apache-2.0
"""The weights of an encoder as live streams want them: prepared once, shared by all sessions, and anew when they change."""

import threading
import weakref
from operator import attrgetter
from operator import is_ as _is

import torch

from nemo.collections.asr.parts.streaming import layers
from nemo.collections.asr.parts.streaming.linear import PreparedLinear
from nemo.collections.asr.parts.streaming.subsampling import IncrementalSubsampling

_VERSION, _PLACE = attrgetter('_version'), torch.Tensor.data_ptr
_LOCK = threading.RLock()
_PREPARED: 'weakref.WeakKeyDictionary' = weakref.WeakKeyDictionary()


class _Seen:
    """The parameters and buffers of some modules as they are now.

    It is asked in every step, so it looks at no values: a tensor is another if it was replaced, moved or written to. What
    is written through ``tensor.data`` is not counted by torch; :meth:`has_values` sees that, too.

    Args:
        modules: whose.
    """

    def __init__(self, modules: list):
        found = [
            (owner, name, tensor)
            for part in modules
            for module in part.modules()
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._owners, self._names, self._tensors = map(list, zip(*found))
        counted = [
            tensor for tensor in self._tensors if not tensor.is_inference()
        ]  # those of inference mode count nothing
        self._counted, self._versions = counted, [tensor._version for tensor in counted]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._sums = self._sum()

    def holds(self) -> bool:
        """Return whether all are the same tensors, in the same places, and nobody has written to them."""
        return (
            list(map(_VERSION, self._counted)) == self._versions
            and list(map(_PLACE, self._tensors)) == self._places
            and all(map(_is, map(dict.get, self._owners, self._names), self._tensors))
        )

    def has_values(self) -> bool:
        """Return whether their sums are the same."""
        return torch.equal(self._sum(), self._sums)

    def _sum(self) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return torch.stack([tensor.sum(dtype=torch.float64) for tensor in self._tensors if not tensor.is_meta])


class PreparedEncoder:
    """The weights of a ``ConformerEncoder``, arranged for live streams.

    Args:
        encoder: in eval mode.
        precision: of the layers' weights, see :class:`PreparedLinear`.
    """

    def __init__(self, encoder: torch.nn.Module, precision: str = 'float32'):
        self._encoder = weakref.ref(encoder)
        parts = [_subsampling_of(encoder), encoder.layers]
        self._seen = _Seen(parts if encoder.out_proj is None else [*parts, encoder.out_proj])
        with torch.inference_mode(False), torch.no_grad():
            self.subsampling = IncrementalSubsampling(_subsampling_of(encoder))
            self.layers = [layers.PreparedLayer(layer, precision) for layer in encoder.layers]
            out = encoder.out_proj
            self.out = None if out is None else PreparedLinear(out.weight, out.bias)
        self._positions: dict = {}

    @classmethod
    def of(cls, encoder: torch.nn.Module, precision: str = 'float32', by_value: bool = False) -> 'PreparedEncoder':
        """Return what is prepared of an encoder, after preparing it if its weights are others than before.

        Args:
            encoder: the encoder.
            precision: of the layers' weights.
            by_value: whether to look at the weights' values, too, which takes a pass over them.
        """
        found = _PREPARED.setdefault(encoder, {}).get(precision)
        if found is None or not found._seen.holds() or (by_value and not found._seen.has_values()):
            with _LOCK:
                found = _PREPARED[encoder][precision] = cls(encoder, precision)
        return found

    def positions(self, index: int, future: int, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys [H, K, P] of a layer's positions and the scores [H, 1, P] that all queries share.

        The positions reach from ``future`` frames ahead to ``past`` frames behind.

        Args:
            index: of the layer.
            future, past: frames.
        """
        key = index, future, past
        if key not in self._positions:
            with _LOCK, torch.inference_mode(False), torch.no_grad():
                embeddings = _embeddings(self._encoder(), future, past)
                self._positions[key] = self.layers[index].positions(embeddings)
        return self._positions[key]


def why_not(encoder: torch.nn.Module) -> str | None:
    """Return why an encoder's weights cannot be prepared, or None."""
    for index, layer in enumerate(encoder.layers):
        reason = layers.why_not(layer)
        if reason:
            return f'encoder.layers[{index}]: {reason}'
    convolutions = [layer for layer in _subsampling_of(encoder).conv if isinstance(layer, torch.nn.Conv2d)]
    if any(layer.stride != (1, 1) and layer.kernel_size != (3, 3) for layer in convolutions):
        return 'encoder.pre_encode has convolutions of other sizes than 3 x 3'
    return None


def _subsampling_of(encoder) -> torch.nn.Module:
    return getattr(encoder.pre_encode, 'pre_encode', encoder.pre_encode)


def _embeddings(encoder, future: int, past: int) -> torch.Tensor:
    """Return the embeddings of relative positions, [future + past + 1, D]; the first is the farthest ahead."""
    needed = max(future, past) + 1
    if needed > encoder.max_audio_length:
        encoder.set_max_audio_length(2 * needed)
    table = encoder.pos_enc.pe[0]
    centre = table.shape[0] // 2  # the embedding of distance 0; greater distances lie before it
    return table[centre - past : centre + future + 1].flip(0)
