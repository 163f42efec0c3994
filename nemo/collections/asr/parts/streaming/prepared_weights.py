# SPDX-License-Identifier: Apache-2.0
"""The weights of an encoder, copied and arranged for live streams: once for all sessions that start with the same weights."""

import hashlib
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import nn

from nemo.collections.asr.parts.streaming.encoder import subsampling_of
from nemo.collections.asr.parts.streaming.layers import PositionTable, PreparedLayer
from nemo.collections.asr.parts.streaming.linear import PreparedLinear
from nemo.collections.asr.parts.streaming.subsampling import IncrementalSubsampling
from nemo.collections.asr.parts.submodules.multi_head_attention import RelPositionalEncoding

PLAIN = (bool, int, float, str, tuple)
SAMPLED = 31  # elements of each tensor that are compared
_LOCK = threading.RLock()
_PREPARED: 'weakref.WeakKeyDictionary' = weakref.WeakKeyDictionary()


class _Seen:
    """Modules and tensors of an encoder as they are now; no tensor is read as a whole.

    Another module or tensor, another place, a write that torch counts, and a write through ``tensor.data`` that changes one
    of some sampled elements make a difference.
    """

    def __init__(self, encoder: nn.Module):
        parts = subsampling_of(encoder), encoder.layers, encoder.out_proj
        modules = [module for part in parts if part is not None for module in part.modules()]
        owned = (owner.values() for module in modules for owner in (module._parameters, module._buffers))
        # they are kept, so that no other tensor gets their place
        self._tensors = [tensor for values in owned for tensor in values if tensor is not None]
        self._facts = [(type(module), _settings_of(module)) for module in modules] + [
            (None if each.is_inference() else each._version, each.data_ptr(), each.dtype) for each in self._tensors
        ]
        with torch.inference_mode(False), torch.no_grad():
            samples = [each.flatten()[:: max(each.numel() // SAMPLED, 1)].float() for each in self._tensors]
            self._samples = torch.cat(samples).nan_to_num()

    def equals(self, other: '_Seen') -> bool:
        """Return whether nothing has changed."""
        return self._facts == other._facts and torch.equal(self._samples, other._samples)

    def digest(self) -> str:
        """Return a digest of shapes and sampled elements."""
        shapes = str([list(tensor.shape) for tensor in self._tensors]).encode()
        return hashlib.sha256(shapes + self._samples.cpu().numpy().tobytes()).hexdigest()[:16]


def _settings_of(module: nn.Module) -> list:
    """Return the plain attributes of a module, and which adapters are enabled."""
    plain = [value for name, value in vars(module).items() if name[0] != '_' and isinstance(value, PLAIN)]
    return plain + (module.get_enabled_adapters() if hasattr(module, 'get_enabled_adapters') else [])


class PreparedEncoder:
    """A copy of the weights of a ``ConformerEncoder`` that can stream, arranged for live streams; see :meth:`of`."""

    def __init__(self, encoder: nn.Module, precision: str, seen: _Seen):
        self._seen = seen
        with torch.inference_mode(False), torch.no_grad():
            self.subsampling = IncrementalSubsampling(subsampling_of(encoder))
            self.layers = [PreparedLayer(layer, precision) for layer in encoder.layers]
            out, scale = encoder.out_proj, encoder.pos_enc.xscale
            self.out = None if out is None else PreparedLinear(out.weight, out.bias)
            self.scale = 1.0 if scale is None else float(scale)
        weight = encoder.layers[0].self_attn.linear_pos.weight
        self._like = encoder.d_model, encoder.pos_enc.pe.dtype, weight.device
        self._positions: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, encoder: nn.Module, precision: str = 'float32') -> 'PreparedEncoder':
        """Return the present weights of an encoder, which are prepared if they are others than before.

        Args:
            encoder: in eval mode, one that ``encoder.why_not`` finds nothing in.
            precision: of the layers' weights, a key of ``linear.LINEARS``.
        """
        with _LOCK:
            prepared, seen = _PREPARED.setdefault(encoder, {}), _Seen(encoder)
            if precision not in prepared or not prepared[precision]._seen.equals(seen):
                prepared[precision] = cls(encoder, precision, seen)
            return prepared[precision]

    @cached_property
    def digest(self) -> str:
        """What identifies the weights in the state of a stream."""
        return self._seen.digest()

    def positions(self, index: int, future: int, past: int) -> PositionTable:
        """Return the table of a layer's positions; it is kept as long as a session holds it.

        Args:
            index: of the layer.
            future, past: frames ahead and behind that it reaches.
        """
        with _LOCK:
            found = self._positions.get((index, future, past))
            if found is None:
                with torch.inference_mode(False), torch.no_grad(), without_autocast(self._like[2]):
                    found = self.layers[index].positions(self._embeddings(future, past))
                self._positions[index, future, past] = found
            return found

    def _embeddings(self, future: int, past: int) -> torch.Tensor:
        """Return the embeddings of relative positions, [future + past + 1, D]; the first is the farthest ahead."""
        width, dtype, device = self._like
        encoding = RelPositionalEncoding(width, 0.0)  # of its own: the encoder's table keeps its size
        encoding.extend_pe(max(future, past) + 1, device, dtype)
        table = encoding.pe[0]
        centre = table.shape[0] // 2  # the embedding of distance 0; greater distances lie before it
        return table[centre - past : centre + future + 1].flip(0)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which operations keep the dtype of their inputs."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
