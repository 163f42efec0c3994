# SPDX-License-Identifier: Apache-2.0
"""Helpers that override a model's context: each calls ``model.set_att_context_size``.

``model`` is one of this project's SSL models. A context is what ``AttContext.parse`` reads. ValueError names what is no
context, or a model that takes none.

Shapes: B batch, D features, M mask frames, A attention frames, S target frames, C classes, H codebooks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nemo.collections.asr.parts.att_context.context import PRESETS, AttContext


@dataclass
class Processed:
    """A model's output for audio without masking; iterates over the four values of its ``forward``."""

    log_probs: torch.Tensor  # [B, A, C], or [B, A, C, H] with H codebooks
    encoded_lengths: torch.Tensor  # [B], in attention frames
    masks: torch.Tensor  # [B, D, M], all 0
    tokens: torch.Tensor  # the targets, [B, S] or [B, S, H]
    encoded: torch.Tensor  # [B, d_model, A]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.log_probs, self.encoded_lengths, self.masks, self.tokens))


def sync_masking_to_attention(model: Any) -> int:
    """Return the masking's left context, in attention frames, -1 = unlimited; it is the encoder's."""
    _check_takes_context(model)
    masking: Any = getattr(model, 'mask_processor', None)
    if not hasattr(masking, 'left_context_size'):
        raise ValueError(f"the masking of {type(model).__name__}, {type(masking).__name__}, takes no context")
    return masking.left_context_size


def set_dynamic_context(model: Any, context: Any) -> None:
    """Override the context for attention and masking; None: what the model was configured with."""
    _check_takes_context(model)
    model.set_att_context_size(context)


class DynamicContextModel:
    """A model whose ``att_context_size`` can be set, for attention and masking alike.

    All else is the model's: attributes are read from it and set on it, and calls go to it. It is no ``nn.Module``;
    a trainer takes ``wrapper.model``. ``context_presets`` are the presets, by name; ``presets`` adds to them, or changes
    them: ``{'tiny': [40, 0]}``.
    """

    def __init__(self, model: Any, presets: Mapping[str, Any] | None = None) -> None:
        _check_takes_context(model)
        contexts = {name: list(context) for name, context in PRESETS.items()}
        for name, context in (presets or {}).items():
            contexts[name] = AttContext.parse(context, f'presets[{name!r}]').as_list()
        self.__dict__.update(model=model, context_presets=contexts)

    @property
    def att_context_size(self) -> list[int]:
        """The encoder's present context, [left, right] in attention frames; takes what ``set_context`` takes."""
        return list(self.model.encoder.att_context_size)

    @att_context_size.setter
    def att_context_size(self, context: Any) -> None:
        self.model.set_att_context_size(self._resolve(context))

    def __getattr__(self, name: str) -> Any:
        if name == 'model':  # a copy in the making
            raise AttributeError(name)
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'att_context_size':
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped model."""
        return self.model(*args, **kwargs)

    def _resolve(self, context: Any) -> Any:
        if not isinstance(context, str):
            return context
        if context not in self.context_presets:
            raise ValueError(f"no preset is called {context!r}; known are {', '.join(self.context_presets)}")
        return AttContext.parse(self.context_presets[context], f'context_presets[{context!r}]')


class EnhancedDynamicContextModel(DynamicContextModel):
    """A :class:`DynamicContextModel` with a temporary context, and inference without masking."""

    def set_context(self, mode_or_context: Any) -> None:
        """Override the context for attention and masking: the name of a preset, or a context."""
        self.att_context_size = mode_or_context

    @contextmanager
    def using_context(self, context: Any) -> Iterator['EnhancedDynamicContextModel']:
        """Attend and mask within this context inside a ``with`` block."""
        with self.model.using_att_context_size(self._resolve(context)):
            yield self

    def process(self, audio: torch.Tensor, lengths: torch.Tensor) -> Processed:
        """Run a model that predicts tokens on samples [B, N]: no masking, dropout, dither or gradients."""
        if 'apply_mask' not in self.model.input_types:
            raise ValueError(f"process needs a model that predicts tokens; {type(self.model).__name__} does not")
        modes, made = {module: module.training for module in self.model.modules()}, []
        hook = self.model.encoder.register_forward_hook(lambda encoder, given, output: made.append(output[0]))
        self.model.eval()
        try:
            with torch.no_grad():  # not inference_mode: the encoder may keep tables that it makes here
                log_probs, encoded_lengths, masks, tokens = self.model(
                    input_signal=audio, input_signal_length=lengths, apply_mask=False
                )
        finally:
            hook.remove()
            for module, training in modes.items():
                module.training = training
        return Processed(log_probs, encoded_lengths, masks, tokens, made[-1])


def _check_takes_context(model: Any) -> None:
    if not hasattr(model, 'set_att_context_size'):
        raise ValueError(f"{type(model).__name__} takes no context; it needs one of this project's SSL models")
