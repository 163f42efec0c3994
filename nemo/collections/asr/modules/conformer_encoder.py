# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``conformer_encoder.py``: attention contexts by batch and by layer.

One attention context per batch, known before the encoder runs; each layer attends within it and a context of its own.
"""

import re
from contextlib import nullcontext
from dataclasses import replace

import torch
from omegaconf import open_dict

from nemo.collections.asr.parts.att_context.blockwise import (
    BlockwiseMask,
    LayerAttentionMasks,
    parse_choice,
    wins_by_blocks,
)
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext, is_distribution
from nemo.collections.asr.parts.att_context.encoder_context import EncoderContext
from nemo.collections.asr.parts.att_context.policy import SAMPLER, ContextSampler
from nemo.collections.asr.parts.att_context.schedule import LayerContexts, parse_layer_contexts
from nemo.collections.asr.parts.att_context.windows import STYLES, Window, tightest_window
from nemo.core.classes.mixins import adapter_mixins
from nemo_streaming_ssl import upstream

_up = upstream(globals())

LAYER_CONTEXTS = 'layer_att_context_size'  # the argument, and the config key


class ConformerEncoder(EncoderContext, _up.ConformerEncoder):
    """NeMo's Conformer encoder that owns the attention context: policy, override and active context.

    Takes NeMo's arguments, and:

    Args:
        att_context_seed: seed of the draw among several ``att_context_size`` entries, a function of it and the step.
        att_context_shared: whether all ranks draw the same context in a step; false draws for each rank.
        att_context_sampler: the section of a ``ContextSampler``: draws the context of each training batch in place of
            ``att_context_size``, which then holds in validation and inference.
        layer_att_context_size: contexts of the layers' own, see :meth:`set_layer_att_context_size`.
        blockwise_attention: whether layers with a limited context attend block by block, at linear cost: ``auto`` (where
            it is faster), ``on`` or ``off`` (NeMo bit for bit); it can be set at any time. Cached streaming steps and
            exports use NeMo's attention.
        activation_checkpointing: layers whose activations the backward pass computes again instead of keeping them:
            ``none``, ``layers`` or ``every_n`` with a number for n (``every_2``: each second layer).

    Raises:
        ValueError: if an argument has a value that is not allowed, or the encoder's attention does not support a context.
    """

    _layer_contexts: LayerContexts = ()
    _streaming_arguments: dict = {}  # of the last setup_streaming_params

    def __init__(
        self,
        *args,
        att_context_seed: int = 0,
        att_context_shared: bool = True,
        att_context_sampler=None,
        layer_att_context_size=None,
        blockwise_attention: str = 'auto',
        activation_checkpointing: str = 'none',
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.blockwise_attention = parse_choice(blockwise_attention)
        if att_context_sampler is not None:
            self._check_can_narrow(SAMPLER)
            att_context_sampler = ContextSampler.parse(att_context_sampler, self.att_context_style)
        self._set_policy(att_context_sampler, att_context_seed, att_context_shared)
        for index, layer in enumerate(self.layers):
            layer.recomputes = _recomputes(activation_checkpointing, index)
        self._connect_layers()
        self._layer_contexts = (None,) * len(self.layers)
        self.set_layer_att_context_size(layer_att_context_size)

    def tightest_left_context(self) -> int:
        """The smallest limited left context of the present context, the layers' and in training the ceiling.

        In attention frames, -1 if nothing limits it. A layer that sees itself alone is left out: no masking makes it see less.
        """
        if self.att_context_style in STYLES:
            return self.tightest_window().context.left
        return self.att_context_size[0]

    def tightest_window(self) -> Window:
        """What each layer sees in the present context at least, in training within the ceiling."""
        present = self._present_context()
        if self.training:
            present = self.att_context_policy.narrowed(present)
        return tightest_window(self.effective_windows(present))

    def layer_att_contexts(self) -> LayerContexts:
        """Each layer's own context, None for a layer without one."""
        return self._layer_contexts

    def effective_att_contexts(self, att_context_size=None) -> tuple[AttContext, ...]:
        """What each layer attends to in a batch's context (None: the present one); ValueError if its own cuts chunks."""
        batch = self.parse_att_context_size(self.att_context_size if att_context_size is None else att_context_size)
        where = 'encoder.layers[{}].self_attention.att_context_size is {}'
        return tuple(
            batch if own is None else self.att_context_policy.within(batch, own, where.format(index, list(own)))
            for index, own in enumerate(self._layer_contexts)
        )

    def effective_windows(self, att_context_size=None) -> tuple[Window, ...]:
        """The windows of :meth:`effective_att_contexts`; ValueError if the style's are not known."""
        contexts = self.effective_att_contexts(att_context_size)
        return tuple(Window(context, self.att_context_style) for context in contexts)

    def set_layer_att_context_size(self, contexts) -> None:
        """Give the layers contexts of their own; each attends within the intersection with the batch's.

        ``encoder.layers[i].self_attention.att_context_size = [40, 0]`` does it for one layer. The contexts are written
        to the encoder's config.

        Args:
            contexts: what ``parse_layer_contexts`` reads: one per layer, in attention frames, or a schedule such as
                ``[[0, [40, 0]], [6, [120, 0]]]``; None restores the batch's context in every layer. -1 narrows nothing.

        Raises:
            ValueError: naming the item and its value, if it is no context, or the attention does not support it.
        """
        before, self._layer_contexts = self._layer_contexts, self._parse_layer_contexts(contexts)
        if self._layer_contexts != before:
            self.setup_streaming_params(**self._streaming_arguments)
        if hasattr(self, '_cfg'):  # built by a model
            self.write_layer_contexts_to(self._cfg)

    def setup_streaming_params(
        self, chunk_size=None, shift_size=None, left_chunks=None, att_context_size=None, max_context: int = 10000
    ):
        """Set ``streaming_cfg``; arguments are NeMo's. Later changes of layer contexts update it.

        The cache is as long as the largest left context that any layer can use. With ``regular`` style the look-ahead
        of a chunk is the sum of the layers' right contexts. :meth:`get_initial_cache_state` refuses what cannot be streamed.
        """
        given = dict(chunk_size=chunk_size, shift_size=shift_size, left_chunks=left_chunks)
        self._streaming_arguments = dict(given, att_context_size=att_context_size, max_context=max_context)
        if not self._has_layer_contexts():
            return super().setup_streaming_params(**self._streaming_arguments)
        batch, look_ahead = self._streaming_window(), self._streaming_look_ahead()
        if chunk_size is None and self.att_context_style == 'regular' and look_ahead != UNLIMITED:
            given.update(chunk_size=look_ahead + 1, shift_size=1)
        # Stock supports one left context only; with left_chunks it takes none, and does not warn.
        given['left_chunks'] = left_chunks or 0
        super().setup_streaming_params(**given, att_context_size=list(batch.context), max_context=max_context)
        if left_chunks is None or chunk_size is None:  # in whole chunks, so that those of cache and input meet
            lefts = [context.left for context in self.effective_att_contexts(batch.context)]
            frames = max_context if UNLIMITED in lefts else max(lefts)
            self.streaming_cfg.last_channel_cache_size = -(-frames // batch.chunk) * batch.chunk

    def set_default_att_context_size(self, att_context_size):
        """Set the default context, and clear the override; arguments are NeMo's."""
        with self._assigning_default():
            super().set_default_att_context_size(att_context_size)

    def get_initial_cache_state(self, *args, **kwargs):
        """Return NeMo's empty caches; ValueError for abs_pos, or layer contexts that cannot be streamed."""
        if self.self_attention_model == 'abs_pos':  # a chunk would get the positions of the start
            raise ValueError("encoder.self_attention_model is abs_pos; to be streamed with caches, it must be rel_pos")
        if self._has_layer_contexts():
            self._check_can_stream()
        return super().get_initial_cache_state(*args, **kwargs)

    def streaming_post_process(self, rets, keep_all_outputs=True):
        """Trim outputs and caches; arguments and results are NeMo's, which lets a cache of no frames grow."""
        rets = super().streaming_post_process(rets, keep_all_outputs)
        if rets[2] is not None and self.streaming_cfg.last_channel_cache_size == 0:
            return (*rets[:2], rets[2][:, :, :0], *rets[3:])
        return rets

    def change_attention_model(self, self_attention_model=None, *args, **kwargs):
        """Exchange the attention modules; arguments are NeMo's. The layers keep their contexts.

        Raises:
            ValueError: if the new attention does not support the layers' contexts.
        """
        if self._has_layer_contexts() and self_attention_model == 'rel_pos_local_attn':
            raise ValueError(
                "change_attention_model: rel_pos_local_attn does not support contexts by layer; drop them first with "
                "set_layer_att_context_size(None)"
            )
        with self._assigning_default():
            super().change_attention_model(self_attention_model, *args, **kwargs)
        is_local, policy = self.self_attention_model == 'rel_pos_local_attn', self.att_context_policy
        if is_local or len(self.att_context_size_all) == 1:
            self.att_context_size_all, sampler = [policy.default.as_list()], None if is_local else policy.sampler
            self.att_context_policy = replace(policy, options=(policy.default,), probabilities=(1.0,), sampler=sampler)
        self._connect_layers()
        if self._has_layer_contexts():  # sets what the new modules drop from their cache, too
            self.setup_streaming_params(**self._streaming_arguments)

    def forward_internal(self, audio_signal, length, cache_last_channel=None, *args, **kwargs):
        """Run the encoder within one context; arguments and results are NeMo's."""
        if cache_last_channel is not None:  # stock counts the chunk only, and fails with an unlimited left context
            positions = max(audio_signal.shape[1:]) + cache_last_channel.shape[2]
            self.set_max_audio_length(max(positions, self.max_audio_length))
        # Otherwise in the present context; threads share an encoder, so nothing is set.
        context = self.using_att_context_size(self._context_of_pass(audio_signal)) if self.training else nullcontext()
        with context:
            return super().forward_internal(audio_signal, length, cache_last_channel, *args, **kwargs)

    def _create_masks(self, att_context_size, *args, **kwargs):
        # Stock's forward draws a context into a local variable and uses it for this call only.
        att_context_size = self.att_context_size if self._active is not None else att_context_size
        effective, masks = self.effective_att_contexts(att_context_size), {}
        for context in set(effective):
            pad_mask, masks[context] = self._create_mask(context, *args, **kwargs)
        return pad_mask, LayerAttentionMasks([masks[each] for each in effective]) if len(masks) > 1 else masks[context]

    def _create_mask(self, context, padding_length, max_audio_length, offset, device):
        """Return the padding [B, T], and the mask of layers that attend to this context, True = hidden."""
        if offset is None and self._attends_in_blocks(context, max_audio_length):
            padding = torch.arange(max_audio_length, device=device) >= padding_length.unsqueeze(-1)
            return padding, BlockwiseMask(Window(context, self.att_context_style), padding)
        return super()._create_masks(list(context), padding_length, max_audio_length, offset, device)

    def _attends_in_blocks(self, context, frames: int) -> bool:
        choice = parse_choice(self.blockwise_attention)
        if choice == 'off' or not frames or self.self_attention_model not in ('rel_pos', 'abs_pos'):
            return False
        if self.att_context_style not in STYLES or UNLIMITED in (context.left, context.right):
            return False
        if torch.jit.is_tracing() or torch.compiler.is_exporting():  # what they make must serve any length
            return False
        window, positions = Window(context, self.att_context_style), self.self_attention_model == 'rel_pos'
        return choice == 'on' or wins_by_blocks(window, frames, positions, self.use_pytorch_sdpa)

    def _calc_context_sizes(self, *, att_context_probs, **kwargs):
        if att_context_probs and is_distribution(att_context_probs, len(att_context_probs)):
            # Stock requires a sum of exactly 1, which ten times 0.1 misses.
            att_context_probs = [*att_context_probs[:-1], 1 - sum(att_context_probs[:-1])]
        return super()._calc_context_sizes(att_context_probs=att_context_probs, **kwargs)

    def _has_layer_contexts(self) -> bool:
        return any(context is not None for context in self._layer_contexts)

    def _parse_layer_contexts(self, contexts) -> LayerContexts:
        if contexts is None:
            return (None,) * len(self.layers)
        field, policy = f'encoder.{LAYER_CONTEXTS}', self.att_context_policy
        self._check_can_narrow(field)
        return parse_layer_contexts(contexts, len(self.layers), field, policy.left_multiple, policy.check_layer)

    def _check_can_narrow(self, where: str) -> None:
        model, style = self.self_attention_model, self.att_context_style
        if model == 'rel_pos_local_attn' or style not in STYLES:
            raise ValueError(
                f"{where}: self_attention_model {model} with att_context_style {style} has one context in all its "
                f"layers; use rel_pos or abs_pos, with one of {STYLES}"
            )

    def _connect_layers(self) -> None:
        for index, layer in enumerate(self.layers):
            layer.self_attn.index = index
            object.__setattr__(layer.self_attn, 'encoder', self)  # not as a submodule

    def write_layer_contexts_to(self, cfg) -> None:
        """Write the layers' contexts to an encoder's config, if it has others."""
        if self._parse_layer_contexts(cfg.get(LAYER_CONTEXTS)) == self._layer_contexts:
            return
        with open_dict(cfg):
            cfg.pop(LAYER_CONTEXTS, None)
            if self._has_layer_contexts():
                cfg[LAYER_CONTEXTS] = [None if own is None else own.as_list() for own in self._layer_contexts]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if not hasattr(self.pre_encode, 'pre_encode'):  # pre-trained with post-conv masking, which wraps it
            wrapped = prefix + 'pre_encode.pre_encode.'
            for name in [name for name in state_dict if name.startswith(wrapped)]:
                state_dict[f'{prefix}pre_encode.{name[len(wrapped) :]}'] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _streaming_window(self) -> Window:
        """Return the window of the context that streaming was last set up for."""
        context = self._streaming_arguments.get('att_context_size') or self.att_context_size
        return Window(self.parse_att_context_size(context), self.att_context_style)

    def _streaming_look_ahead(self) -> int:
        """Frames after a frame, or after its chunk, that its output depends on; -1 without a limit."""
        batch = self._streaming_window()
        if batch.has_chunks:
            return 0
        rights = [context.right for context in self.effective_att_contexts(batch.context)]
        if UNLIMITED in rights or batch.style == 'chunked_limited':
            return UNLIMITED
        return sum(right + self.conv_context_size[1] for right in rights)

    def _check_can_stream(self) -> None:
        batch, overlap, given = self._streaming_window(), self._streaming_look_ahead(), self._streaming_arguments
        where, chunk = f'att_context_size {list(batch.context)}', given['chunk_size']
        if overlap == UNLIMITED:
            raise ValueError(f"{where} cannot be streamed: its right context, or that of a layer, is unlimited")
        if chunk is not None and (chunk % batch.chunk or chunk - given['shift_size'] < overlap):
            raise ValueError(
                f"chunk_size is {chunk} and shift_size {given['shift_size']}; with {where} chunk_size must be a "
                f"multiple of {batch.chunk}, and {overlap} more than shift_size"
            )

    def _check_can_attend_within(self, context) -> None:
        default = self.att_context_policy.default
        if self.self_attention_model == 'rel_pos_local_attn' and context != default:
            raise ValueError(
                f"encoder.att_context_size cannot become {list(context)}: self_attention_model rel_pos_local_attn "
                f"builds {list(default)} into its layers; use change_attention_model"
            )
        if self.att_context_style == 'chunked_limited':
            Window(context, 'chunked_limited').intersect(context, 'encoder.att_context_size')


def _recomputes(choice: str, layer: int) -> bool:
    """Return whether a layer's activations are computed again, by ``activation_checkpointing``."""
    checkpointed = re.fullmatch(r'layers|every_([1-9]\d*)', str(choice))
    if checkpointed is None and choice != 'none':
        raise ValueError(
            f"model.encoder.activation_checkpointing is {choice!r}; it must be none, layers, or every_n with a number "
            "of 1 or more for n, such as every_2"
        )
    return checkpointed is not None and layer % int(checkpointed[1] or 1) == 0


class ConformerEncoderAdapter(ConformerEncoder, _up.ConformerEncoderAdapter):
    """NeMo's adapter methods over the patched encoder."""


# NeMo registered its own pair under the same names when its module was loaded.
adapter_mixins.ADAPTER_REGISTRY.pop(f'{ConformerEncoder.__module__}.{ConformerEncoder.__name__}', None)
adapter_mixins.register_adapter(base_class=ConformerEncoder, adapter_class=ConformerEncoderAdapter)
