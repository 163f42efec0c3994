# SPDX-License-Identifier: Apache-2.0
"""Helpers that override a model's context: each calls ``model.set_att_context_size``.

``model`` is one of this project's SSL models. A context is what ``AttContext.parse`` reads. ValueError names what is no
context, or a model that takes none.

Shapes: B batch, N samples, D features, M mask frames, A attention frames, S target frames, C classes, H codebooks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from nemo.collections.asr.parts.att_context.context import PRESETS, AttContext


class _OfForward(NamedTuple):
    log_probs: torch.Tensor | None
    encoded_lengths: torch.Tensor
    masks: torch.Tensor | None
    tokens: torch.Tensor | None


class Processed(_OfForward):
    """What a model makes of audio without masking: the four values of its ``forward``, and what it encoded.

    A model that predicts no tokens has None for all of these but the lengths.

    Attributes:
        log_probs: [B, A, C], or [B, A, C, H] with H codebooks.
        encoded_lengths: [B], in attention frames.
        masks: [B, D, M], all 0.
        tokens: the targets, [B, S] or [B, S, H].
        encoded: [B, d_model, A].
    """

    encoded: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """The same as ``encoded_lengths``."""
        return self.encoded_lengths


def sync_masking_to_attention(model) -> int:
    """Return the masking's left context, which follows the encoder: there is nothing to synchronise.

    It is the tighter of what the encoder's tightest layer sees now and of the configured ``masking.left_context_size``,
    in attention frames, -1 = unlimited.
    """
    encoder, masking = getattr(model, 'encoder', None), getattr(model, 'mask_processor', None)
    if not hasattr(encoder, 'tightest_left_context'):
        raise ValueError(f"{type(model).__name__} has no encoder with an attention context")
    if not hasattr(masking, 'left_context_size'):
        raise ValueError(f"the masking of {type(model).__name__}, {type(masking).__name__}, takes no context")
    return masking.left_context_size


def set_dynamic_context(model, context) -> None:
    """Override the context for attention and masking; None: what the model was configured with."""
    _check_takes_context(model)
    model.set_att_context_size(context)


class DynamicContextModel:
    """A model whose ``att_context_size`` can be set, for attention and masking alike.

    All else is the model's: attributes are read from it and set on it, and calls go to it. It is no ``nn.Module``;
    what needs one (such as a trainer) takes ``wrapper.model``. Nothing of it is in a checkpoint.
    """

    def __init__(self, model):
        _check_takes_context(model)
        self.__dict__['model'] = model

    @property
    def att_context_size(self) -> list[int]:
        """The encoder's present context, [left, right] in attention frames; takes what ``set_context`` takes."""
        return list(self.model.encoder.att_context_size)

    @att_context_size.setter
    def att_context_size(self, context) -> None:
        self.model.set_att_context_size(self._resolve(context))

    def __getattr__(self, name):
        if name == 'model':  # a copy in the making
            raise AttributeError(name)
        return getattr(self.model, name)

    def __setattr__(self, name, value):
        if name == 'att_context_size':
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def __call__(self, *args, **kwargs):
        """Call the wrapped model."""
        return self.model(*args, **kwargs)

    def __repr__(self):
        masking = getattr(getattr(self.model, 'mask_processor', None), 'left_context_size', 'without context')
        trained = ', '.join(str(list(context)) for context in self.model.encoder.att_context_size_all)
        return (
            f"{type(self).__name__}({type(self.model).__name__}: attention {self.att_context_size}, masking {masking}, "
            f"configured contexts {trained})"
        )

    def _resolve(self, context):
        return context


class EnhancedDynamicContextModel(DynamicContextModel):
    """A :class:`DynamicContextModel` with presets, a temporary context, and inference without masking.

    Args:
        model: one of this project's SSL models.
        presets: further presets, or other contexts for known names: ``{'tiny': [40, 0]}``.

    Attributes:
        context_presets: the presets, by name; what is set here is one from then on.
    """

    def __init__(self, model, presets: Mapping[str, Any] | None = None):
        super().__init__(model)
        own = {name: AttContext.parse(context, f'presets[{name!r}]') for name, context in (presets or {}).items()}
        self.__dict__['context_presets'] = {name: list(context) for name, context in {**PRESETS, **own}.items()}

    def set_context(self, mode_or_context) -> None:
        """Override the context for attention and masking: the name of a preset, or a context."""
        self.att_context_size = mode_or_context

    @contextmanager
    def using_context(self, context) -> Iterator['EnhancedDynamicContextModel']:
        """Attend and mask within this context inside a ``with`` block; afterwards all is as before."""
        with self.model.using_att_context_size(self._resolve(context)):
            yield self

    def process(self, audio: torch.Tensor, lengths: torch.Tensor) -> Processed:
        """Run the model within the present context, without masking, dropout, dither or gradients.

        ``audio`` are samples [B, N], float, ``lengths`` those of each utterance [B].
        """
        modes = {module: module.training for module in self.model.modules()}
        made = []
        hook = self.model.encoder.register_forward_hook(lambda encoder, given, output: made.append(output[0]))
        self.model.eval()
        try:
            with torch.no_grad():  # not inference_mode: the encoder may keep tables that it makes here
                processed = self._process(audio, lengths)
        finally:
            hook.remove()
            for module, training in modes.items():
                module.training = training
        processed.encoded = made[-1]
        return processed

    def _process(self, audio: torch.Tensor, lengths: torch.Tensor) -> Processed:
        if 'apply_mask' in self.model.input_types:
            return Processed(*self.model(input_signal=audio, input_signal_length=lengths, apply_mask=False))
        features, feature_lengths = self.model.preprocessor(input_signal=audio, length=lengths)
        _, encoded_lengths = self.model.encoder(audio_signal=features, length=feature_lengths)
        return Processed(None, encoded_lengths, None, None)  # it predicts no tokens, and its forward always masks

    def _resolve(self, context):
        if not isinstance(context, str):
            return context
        if context not in self.context_presets:
            raise ValueError(f"no preset is called {context!r}; known are {', '.join(self.context_presets)}")
        return AttContext.parse(self.context_presets[context], f'context_presets[{context!r}]')


def _check_takes_context(model) -> None:
    if not hasattr(model, 'set_att_context_size'):
        raise ValueError(f"{type(model).__name__} takes no context; it needs one of this project's SSL models")
