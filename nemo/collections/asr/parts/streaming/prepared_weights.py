# SPDX-License-Identifier: Apache-2.0
"""The weights of an encoder, copied and arranged for live streams: once for all sessions that start with the same weights."""

import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from operator import is_not

import torch
from torch import nn

from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
from nemo.collections.asr.parts.streaming import layers
from nemo.collections.asr.parts.streaming.layers import PositionTable, has_hooks
from nemo.collections.asr.parts.streaming.linear import PreparedLinear
from nemo.collections.asr.parts.streaming.subsampling import IncrementalSubsampling
from nemo.collections.asr.parts.submodules.causal_convs import CausalConv2D
from nemo.collections.asr.parts.submodules.multi_head_attention import RelPositionalEncoding
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling

PLAIN = (bool, int, float, str, tuple)
SAMPLED = 31  # elements of each tensor that are compared
_LOCK = threading.RLock()
_PREPARED: 'weakref.WeakKeyDictionary' = weakref.WeakKeyDictionary()


class _Seen:
    """The modules, parameters and buffers of some modules as they are now.

    No tensor is read as a whole. Another tensor, another place, a write that torch counts, and a write through
    ``tensor.data`` that changes one of some sampled elements are noticed.

    Args:
        modules: whose.
    """

    def __init__(self, modules: list[nn.Module]):
        found, self._tensors = _walk(modules)
        self._modules = [weakref.ref(module) for module in found]  # which refer to their encoder
        self._settings = [_settings_of(module) for module in found]
        self._facts, self._samples = self._now()

    def holds(self, modules: list[nn.Module]) -> bool:
        """Return whether all are the same."""
        modules, tensors = _walk(modules)
        settings = [_settings_of(module) for module in modules]
        before = [*(module() for module in self._modules), *self._tensors]
        if len(before) != len(modules) + len(tensors) or any(map(is_not, before, [*modules, *tensors])):
            return False
        if self._settings != settings:
            return False
        facts, samples = self._now()
        return facts == self._facts and torch.equal(samples, self._samples)

    def _now(self) -> tuple[list, torch.Tensor]:
        """Return version, place and type of each tensor, and the samples."""
        facts = [
            (None if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype)
            for tensor in self._tensors
        ]
        with torch.inference_mode(False), torch.no_grad():
            samples = [
                tensor.flatten()[:: max(tensor.numel() // SAMPLED, 1)].float()
                for tensor in self._tensors
                if not tensor.is_meta
            ]
            return facts, torch.cat(samples).nan_to_num()


def _walk(roots: list[nn.Module]) -> tuple[list[nn.Module], list[torch.Tensor]]:
    modules = [module for part in roots for module in part.modules()]
    owned = (owner.values() for module in modules for owner in (module._parameters, module._buffers))
    return modules, [tensor for values in owned for tensor in values if tensor is not None]


def _settings_of(module: nn.Module) -> list:
    """Return the plain attributes of a module, and which adapters are enabled."""
    plain = [value for name, value in vars(module).items() if name[0] != '_' and isinstance(value, PLAIN)]
    return plain + (module.get_enabled_adapters() if hasattr(module, 'get_enabled_adapters') else [])


class PreparedEncoder:
    """A copy of the weights of a ``ConformerEncoder``, arranged for live streams.

    Args:
        encoder: in eval mode; :func:`why_not` must return None for it.
        precision: of the layers' weights, see :class:`PreparedLinear`.
    """

    def __init__(self, encoder: nn.Module, precision: str = 'float32'):
        self._seen = _Seen(_parts_of(encoder))
        with torch.inference_mode(False), torch.no_grad():
            self.subsampling = IncrementalSubsampling(_subsampling_of(encoder))
            self.layers = [layers.PreparedLayer(layer, precision) for layer in encoder.layers]
            out = encoder.out_proj
            self.out = None if out is None else PreparedLinear(out.weight, out.bias)
            scale = encoder.pos_enc.xscale
            self.scale = 1.0 if scale is None else float(scale)
        weight = encoder.layers[0].self_attn.linear_pos.weight
        self._like = encoder.d_model, encoder.pos_enc.pe.dtype, weight.device
        self._positions: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, encoder: nn.Module, precision: str = 'float32') -> 'PreparedEncoder':
        """Return the present weights of an encoder, which are prepared if they are others than before.

        Raises:
            ValueError: if the encoder computes what live streams do not, with the place.
        """
        reason = why_not(encoder)
        if reason is not None:
            raise ValueError(f"{type(encoder).__name__} cannot be streamed: {reason}")
        with _LOCK:
            prepared = _PREPARED.setdefault(encoder, {})
            found = prepared.get(precision)
            if found is None or not found._seen.holds(_parts_of(encoder)):
                found = prepared[precision] = cls(encoder, precision)
            return found

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


def why_not(encoder: nn.Module) -> str | None:
    """Return which part of an encoder live streams do not compute, or None."""
    for index, layer in enumerate(encoder.layers):
        reason = layers.why_not(layer)
        if reason:
            return f'encoder.layers[{index}]{reason}'
    subsampling = _subsampling_of(encoder)
    wholes = ('', encoder, ConformerEncoder), ('.pre_encode', subsampling, ConvSubsampling)
    for name, module, kind in (*wholes, ('.pos_enc', encoder.pos_enc, RelPositionalEncoding)):
        for method in ('forward', 'forward_internal'):
            own = getattr(type(module), method, None) != getattr(kind, method, None)
            if own or method in vars(module):
                return f'encoder{name} has a {method} of its own, not that of {kind.__name__}'
    for name, module in subsampling.named_modules():
        kinds = (nn.Linear,) if name == 'out' else (nn.Conv2d, CausalConv2D)
        known = type(module).forward in [kind.forward for kind in kinds] and 'forward' not in vars(module)
        if module._parameters and not known:
            return (
                f'encoder.pre_encode.{name} is a {type(module).__name__} that is not computed as {kinds[0].__name__}'
            )
    convolutions = [layer for layer in subsampling.conv if isinstance(layer, nn.Conv2d)]
    if any(layer.stride != (1, 1) and layer.kernel_size != (3, 3) for layer in convolutions):
        return 'encoder.pre_encode has convolutions of other sizes than 3 x 3'
    if encoder.out_proj is not None and type(encoder.out_proj).forward is not nn.Linear.forward:
        return f'encoder.out_proj is a {type(encoder.out_proj).__name__} that is not computed as Linear'
    parts = [('encoder', encoder), ('encoder.pos_enc', encoder.pos_enc), ('encoder.out_proj', encoder.out_proj)]
    parts += [(f'encoder.pre_encode.{name}', module) for name, module in encoder.pre_encode.named_modules()]
    hooked = [name for name, module in parts if module is not None and has_hooks(module)]
    return f'{hooked[0]} has forward hooks' if hooked else None


def _subsampling_of(encoder) -> nn.Module:
    return getattr(encoder.pre_encode, 'pre_encode', encoder.pre_encode)


def _parts_of(encoder) -> list[nn.Module]:
    parts = [_subsampling_of(encoder), encoder.layers]
    return parts if encoder.out_proj is None else [*parts, encoder.out_proj]
