# SPDX-License-Identifier: Apache-2.0
"""Helpers that override a model's context: each calls ``model.set_att_context_size``.

Shapes: B batch, N samples, D features, M mask frames, A attention frames, S target frames, C classes, H codebooks.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from nemo.collections.asr.parts.att_context.context import PRESETS, AttContext, shown


class _OfForward(NamedTuple):
    log_probs: torch.Tensor | None
    encoded_lengths: torch.Tensor
    masks: torch.Tensor | None
    tokens: torch.Tensor | None


class Processed(_OfForward):
    """What a model makes of audio without masking: the values of its ``forward``, by name, and what it encoded.

    It unpacks as ``log_probs, encoded_lengths, masks, tokens``. A model that predicts no tokens has None for all of
    these but the lengths.

    Attributes:
        log_probs: [B, A, C], or [B, A, C, H] with H codebooks.
        encoded_lengths: [B], in attention frames; ``lengths`` is the same.
        masks: [B, D, M], all 0.
        tokens: the targets, [B, S] or [B, S, H].
        encoded: [B, d_model, A].
    """

    encoded: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """The lengths of what was encoded [B], in attention frames."""
        return self.encoded_lengths


class ContextPresets(MutableMapping):
    """Contexts by name: ``presets['phone'] = [40, 0]`` checks and keeps one, ``presets['phone']`` is a list.

    Args:
        presets: names and contexts, as ``AttContext.parse`` reads them; or names of earlier ones.
        field: what to name in errors.

    Raises:
        ValueError: if a name is no text, or a context is none.
    """

    def __init__(self, presets=(), field: str = 'context_presets'):
        self._field, self._contexts = field, {}
        self.update(presets)

    def __getitem__(self, name) -> list[int]:
        return self._contexts[name].as_list()

    def __setitem__(self, name, context) -> None:
        where = f'{self._field}[{shown(name)}]'
        if not isinstance(name, str):
            raise ValueError(f"{where}: the name of a preset must be text")
        if isinstance(context, str) and context in self._contexts:
            context = self._contexts[context]
        self._contexts[name] = AttContext.parse(context, where)

    def __delitem__(self, name) -> None:
        del self._contexts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._contexts)

    def __len__(self) -> int:
        return len(self._contexts)

    def __repr__(self) -> str:
        return repr(dict(self))


def sync_masking_to_attention(model) -> int:
    """Return the masking's left context, which follows the encoder: there is nothing to synchronise.

    It is the tighter of what the encoder's tightest layer sees now and of the configured ``masking.left_context_size``.

    Args:
        model: one of this project's SSL models.

    Returns:
        the masking's left context in attention frames, -1 = unlimited.

    Raises:
        ValueError: if the model's encoder or masking has no context.
    """
    encoder, masking = getattr(model, 'encoder', None), getattr(model, 'mask_processor', None)
    if not hasattr(encoder, 'tightest_left_context'):
        raise ValueError(f"{type(model).__name__} has no encoder with an attention context")
    if not hasattr(masking, 'left_context_size'):
        raise ValueError(f"the masking of {type(model).__name__}, {type(masking).__name__}, takes no context")
    return masking.left_context_size


def set_dynamic_context(model, context) -> None:
    """Override the context for attention and masking; ``model.set_att_context_size`` as a function.

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
    what needs one (such as a trainer) takes ``wrapper.model``. Nothing of it is in a checkpoint.

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
        if name == 'model':  # a copy in the making
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
        """Call the wrapped model."""
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
        presets: further presets, or other contexts for known names: ``{'tiny': [40, 0]}``. Later ones go to
            ``wrapper.context_presets``.

    Raises:
        ValueError: if the model takes no context, or a preset is none.
    """

    def __init__(self, model, presets=None):
        super().__init__(model)
        self.__dict__['_presets'] = ContextPresets(PRESETS)
        self._presets.update(presets or {})

    @property
    def context_presets(self) -> ContextPresets:
        """The known presets, by name: [left, right] in attention frames. What is set here is a preset from then on."""
        return self._presets

    @property
    def att_context_size(self) -> list[int]:
        """The encoder's present context, [left, right] in attention frames; takes the names of presets."""
        return list(self.model.encoder.att_context_size)

    @att_context_size.setter
    def att_context_size(self, context) -> None:
        self.set_context(context)

    def set_context(self, mode_or_context) -> None:
        """Override the context for attention and masking.

        Args:
            mode_or_context: the name of a preset, or what :func:`set_dynamic_context` takes.

        Raises:
            ValueError: if it is none, naming the presets.
        """
        set_dynamic_context(self.model, self._resolve(mode_or_context))

    @contextmanager
    def using_context(self, context) -> Iterator['EnhancedDynamicContextModel']:
        """Attend and mask within this context inside a ``with`` block; afterwards all is as before."""
        with self.model.using_att_context_size(self._resolve(context)):
            yield self

    def process(self, audio: torch.Tensor, lengths: torch.Tensor) -> Processed:
        """Run the model's forward pass within the present context: without masking, dropout, dither or gradients.

        Args:
            audio: samples [B, N], float.
            lengths: samples of each utterance [B].

        Returns:
            what ``model.forward`` returns for ``apply_mask=False``: ``log_probs``, ``encoded_lengths``, ``masks`` and
            ``tokens``; and ``encoded``, by name only.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():  # not inference_mode: the encoder may keep tables that it makes here
                return self._process(audio, lengths)
        finally:
            for module, training in modes.items():
                module.training = training

    def _process(self, audio, lengths) -> Processed:
        made = []
        keep = self.model.encoder.register_forward_hook(lambda encoder, given, output: made.append(output[0]))
        try:
            if 'apply_mask' in self.model.input_types:
                signal = {'input_signal': audio, 'input_signal_length': lengths}
                processed = Processed(*self.model(**signal, apply_mask=False))
            else:  # it predicts no tokens, and always masks
                features, feature_lengths = self.model.preprocessor(input_signal=audio, length=lengths)
                _, encoded_lengths = self.model.encoder(audio_signal=features, length=feature_lengths)
                processed = Processed(None, encoded_lengths, None, None)
        finally:
            keep.remove()
        processed.encoded = made[-1]
        return processed

    def _resolve(self, context):
        if not isinstance(context, str):
            return context
        if context not in self._presets:
            raise ValueError(f"no preset is called {context!r}; known are {', '.join(self._presets)}")
        return self._presets[context]

    def _described(self) -> str:
        presets = ', '.join(f'{name} {context}' for name, context in self.context_presets.items())
        return f"{super()._described()}, presets {presets}"
