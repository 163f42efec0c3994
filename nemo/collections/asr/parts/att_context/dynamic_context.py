# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Setting a model's context by hand: each way here calls ``model.set_att_context_size``.

Shapes: B batch, N samples, A attention frames, C classes.
"""

from contextlib import contextmanager
from typing import Iterator, NamedTuple, Optional

import torch

from nemo.collections.asr.parts.att_context.context import PRESETS, AttContext
from nemo.collections.asr.parts.att_context.masking_context import follow_left_context


class Encoded(NamedTuple):
    """What a model makes of audio, without masking."""

    encoded: torch.Tensor  # [B, d_model, A]
    lengths: torch.Tensor  # [B], in attention frames
    log_probs: Optional[
        torch.Tensor
    ]  # [B, A, C], or [B, A, C, H] with H codebooks; None: the model predicts no tokens


def sync_masking_to_attention(model) -> int:
    """Mask within what the encoder attends to at present: in its tightest layer, and in either mask position.

    What the user configured as ``masking.left_context_size`` is kept where it is tighter.

    For after changes of the encoder itself, ``encoder.set_layer_att_context_size`` say. (Training steps, and forward
    passes with a limited context, pass the context to the masking anyway.)

    Args:
        model: one of this project's SSL models.

    Returns:
        the masking's left context in attention frames, -1 = unlimited.

    Raises:
        ValueError: if the model's encoder or masking knows no context.
    """
    encoder, masking = getattr(model, 'encoder', None), getattr(model, 'mask_processor', None)
    if not hasattr(encoder, 'tightest_left_context'):
        raise ValueError(f"{type(model).__name__} has no encoder with an attention context")
    if not hasattr(masking, 'left_context_size'):
        raise ValueError(f"the masking of {type(model).__name__}, {type(masking).__name__}, takes no context")
    follow_left_context(masking, encoder.tightest_left_context())
    return masking.left_context_size


def set_dynamic_context(model, context) -> None:
    """Attend and mask within this context until told otherwise; ``model.set_att_context_size`` as a function.

    Args:
        model: one of this project's SSL models.
        context: a preset's name, a pair [left, right] (list, tuple or ListConfig), an int (the left context, with
            right 0), or an ``AttContext``, in attention frames; None: what the model was configured with.

    Raises:
        ValueError: if it is no context, the encoder cannot follow it, or the model takes none.
    """
    if not hasattr(model, 'set_att_context_size'):
        raise ValueError(f"{type(model).__name__} takes no context; it needs one of this project's SSL models")
    model.set_att_context_size(context)


class DynamicContextModel:
    """A model whose ``att_context_size`` can be set, for attention and masking alike.

    All else is the model's: attributes are read from it and set on it, and calls go to it. It is no ``nn.Module``;
    what needs one (a trainer, say) takes ``wrapper.model``. Nothing of it is in a checkpoint.

    Args:
        model: one of this project's SSL models.

    Raises:
        ValueError: if the model takes no context.
    """

    def __init__(self, model):
        if not hasattr(model, 'set_att_context_size'):
            raise ValueError(f"{type(model).__name__} takes no context; it needs one of this project's SSL models")
        self.__dict__['model'] = model

    @property
    def att_context_size(self) -> list[int]:
        """The encoder's present context, [left, right] in attention frames."""
        return list(self.model.encoder.att_context_size)

    @att_context_size.setter
    def att_context_size(self, context) -> None:
        set_dynamic_context(self.model, context)

    def __getattr__(self, name):
        if name == 'model':  # not there yet: a copy in the making
            raise AttributeError(name)
        return getattr(self.model, name)

    def __setattr__(self, name, value):
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name):
        delattr(self.model, name)

    def __dir__(self):
        return sorted({*super().__dir__(), *dir(self.model)})

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __repr__(self):
        return f"{type(self).__name__}({self._described()})"

    def _described(self) -> str:
        masking = getattr(getattr(self.model, 'mask_processor', None), 'left_context_size', 'without context')
        trained = ', '.join(str(list(context)) for context in self.model.encoder.att_context_size_all)
        return (
            f"{type(self.model).__name__}: attention {self.att_context_size}, masking {masking}, "
            f"configured contexts {trained}"
        )


class EnhancedDynamicContextModel(DynamicContextModel):
    """A :class:`DynamicContextModel` with presets, a temporary context, and inference without masking.

    Args:
        model: one of this project's SSL models.
        presets: further presets, or other contexts for known names: ``{'tiny': [40, 0]}``.

    Raises:
        ValueError: if the model takes no context, or a preset is none.
    """

    def __init__(self, model, presets=None):
        super().__init__(model)
        own = {name: AttContext.parse(value, f'presets[{name!r}]') for name, value in dict(presets or {}).items()}
        known = {name: AttContext(*context) for name, context in PRESETS.items()}
        self.__dict__['_presets'] = {**known, **own}

    @property
    def context_presets(self) -> dict[str, list[int]]:
        """The known presets, by name: [left, right] in attention frames."""
        return {name: context.as_list() for name, context in self._presets.items()}

    @property
    def att_context_size(self) -> list[int]:
        """The encoder's present context, [left, right] in attention frames; takes the names of presets."""
        return list(self.model.encoder.att_context_size)

    @att_context_size.setter
    def att_context_size(self, context) -> None:
        self.set_context(context)

    def set_context(self, context) -> None:
        """Attend and mask within this context until told otherwise.

        Args:
            context: the name of a preset, or what :func:`set_dynamic_context` takes.

        Raises:
            ValueError: if it is none, naming the presets.
        """
        set_dynamic_context(self.model, self._resolve(context))

    @contextmanager
    def using_context(self, context) -> Iterator['EnhancedDynamicContextModel']:
        """Attend and mask within this context inside a ``with`` block; afterwards all is as before."""
        with self.model.using_att_context_size(self._resolve(context)):
            yield self

    def process(self, audio: torch.Tensor, lengths: torch.Tensor) -> Encoded:
        """Encode audio within the present context: without masking, dropout, dither or gradients.

        Args:
            audio: samples [B, N], float.
            lengths: samples of each utterance [B].
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():  # not inference_mode: the encoder may keep tables that it makes here
                return self._encode(audio, lengths)
        finally:
            for module, training in modes.items():
                module.training = training

    def _encode(self, audio, lengths) -> Encoded:
        features, feature_lengths = self.model.preprocessor(input_signal=audio, length=lengths)
        if getattr(self.model, 'pre_encoder', None) is not None:  # masks after the convolutions
            self.model.pre_encoder.set_masking_enabled(apply_mask=False)
        encoded, encoded_lengths = self.model.encoder(audio_signal=features, length=feature_lengths)
        decoder = getattr(self.model, 'decoder', None)
        return Encoded(encoded, encoded_lengths, decoder and decoder(encoder_output=encoded))

    def _resolve(self, context):
        if not isinstance(context, str):
            return context
        if context not in self._presets:
            raise ValueError(f"no preset is called {context!r}; known are {', '.join(self._presets)}")
        return self._presets[context]

    def _described(self) -> str:
        presets = ', '.join(f'{name} {context}' for name, context in self.context_presets.items())
        return f"{super()._described()}, presets {presets}"
