# SPDX-License-Identifier: Apache-2.0
"""A causal Conformer encoder run on live streams: exact subsampling, and layers with caches.

Subsampling: encoder frame i depends on the features factor * i - (2 * factor - 2) ... factor * i. So an excerpt that
begins two encoder frames early, or with the stream itself, has every frame from then on exactly; nothing is ever
filled with zeros that were not heard.

Layers: each keeps the frames that its context still reaches (without a limit: all), and what its convolution needs.
A layer with a right context in ``regular`` style waits for the frames that it needs, so look-aheads add up.

Shapes: B streams, R rows (the streams of one group), F features, T feature frames, D the encoder's width,
C cached frames, Q new frames of a layer, A encoder frames given out.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch

from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
from nemo.collections.asr.parts.att_context.context import UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.windows import STYLES, Window
from nemo.collections.asr.parts.streaming.state import EncoderState, LayerCache
from nemo.collections.asr.parts.submodules.multi_head_attention import MultiHeadAttention
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling

OVERLAP = 2  # encoder frames whose features an excerpt repeats
SUBSAMPLINGS = ('dw_striding', 'striding')
CONV_NORMS = ('batch_norm', 'fused_batch_norm', 'layer_norm')  # those that, in eval mode, take each frame by itself
KEPT_MASKS = 64


class StreamingEncoder:
    """Runs a ``ConformerEncoder`` on streams, in one attention context; the state is in an :class:`EncoderState`.

    Args:
        encoder: a ``ConformerEncoder``.
        context: the batch's context; the layers' own ones narrow it.

    Raises:
        ValueError: if the encoder needs what a stream does not have, with the reason.
    """

    def __init__(self, encoder: ConformerEncoder, context: AttContext):
        check_encoder_can_stream(encoder, context)
        self.encoder = encoder
        self.context = context
        self.windows = encoder.effective_windows(context)
        self.contexts = tuple(window.context for window in self.windows)
        self.factor = encoder.subsampling_factor
        chunked = encoder.att_context_style == 'chunked_limited'
        self.chunk = Window(context, encoder.att_context_style).chunk
        self.waits = [0 if chunked else context.right for context in self.contexts]  # of each layer, in frames
        self.look_ahead = context.right if chunked else sum(self.waits)
        self.width = encoder.d_model if encoder.out_proj is None else encoder.out_proj.out_features
        # The wrapper of post-conv masking keeps state of its own; sessions must not share it.
        self.subsampling = getattr(encoder.pre_encode, 'pre_encode', encoder.pre_encode)
        self._masks: dict = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, hence of the caches."""
        return next(self.encoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the weights, hence of the caches."""
        return next(self.encoder.parameters()).device

    def new_state(self, batch: int, features: int) -> EncoderState:
        """The state before the first frame.

        Args:
            batch: B.
            features: F.
        """
        like = dict(dtype=self.dtype, device=self.device)
        model_width, kept = self.encoder.d_model, self.encoder.conv_context_size[0]
        layers = [
            LayerCache(
                torch.zeros(batch, max(context.left, 0), model_width, **like),
                torch.zeros(batch, model_width, kept, **like),
                torch.zeros(batch, wait, model_width, **like),
            )
            for context, wait in zip(self.contexts, self.waits)
        ]
        return EncoderState([torch.zeros(features, 0, **like)] * batch, [0] * batch, [0] * batch, layers)

    def forget(self, state: EncoderState, row: int) -> None:
        """Set one stream back to its beginning."""
        state.features[row] = state.features[row][:, :0]
        state.received[row] = state.frames[row] = 0
        for cache in state.layers:
            cache.convolution = cache.convolution.clone()
            cache.convolution[row] = 0  # of the other two nothing is visible

    def step(
        self,
        state: EncoderState,
        new_features: list[torch.Tensor],
        ended: list[bool],
        replace: Callable | None = None,
    ) -> list[torch.Tensor]:
        """Take feature frames and return the encoder frames that they complete; the state moves on.

        Args:
            state: of the streams.
            new_features: for each stream [F, T].
            ended: for each stream, whether these are its last.
            replace: what the layers get instead of subsampled frames: a function of rows and frames [R, Q, D].

        Returns:
            For each stream its new encoder frames, [D, A].
        """
        for row, features in enumerate(new_features):
            if features.shape[1]:
                state.features[row] = torch.cat((state.features[row], features), dim=1)
                state.received[row] += features.shape[1]
        like = dict(dtype=self.dtype, device=self.device)
        encoded = [torch.zeros(self.width, 0, **like)] * len(new_features)
        for (final, skipped, width, new, _), rows in self._groups(state, ended).items():
            frames = self._subsample(state, rows, width, skipped, None if final else new)
            if replace is not None and frames.shape[1]:
                frames = replace(rows, frames)
            outputs = self._run_layers(state, rows, frames, final)
            for row, output in zip(rows, outputs.transpose(1, 2)):
                encoded[row] = output
                self._move_on(state, row, frames.shape[1])
        return encoded

    def _groups(self, state: EncoderState, ended: list[bool]) -> dict[tuple, list[int]]:
        """Sort the streams by what must agree in one call: how much is new, and how much each layer waits for."""
        groups: dict[tuple, list[int]] = {}
        for row, final in enumerate(ended):
            frames, received = state.frames[row], state.received[row]
            skipped = min(frames, OVERLAP)
            start = self.factor * (frames - skipped)
            new, width = None, received - start
            if not final:
                whole = -(-received // self.factor) // self.chunk * self.chunk
                new = whole - frames
                if new <= 0:  # a stream that has ended in a part of a chunk has more than whole ones
                    continue
                width = self.factor * (whole - 1) + 1 - start
            key = (final, skipped, width, new, min(frames, sum(self.waits)))
            groups.setdefault(key, []).append(row)
        return groups

    def _subsample(self, state, rows, width: int, skipped: int, new: int | None) -> torch.Tensor:
        """Return the new frames [R, Q, D] of excerpts of ``width`` features; all there are, if ``new`` is None."""
        excerpts = torch.stack([state.features[row][:, :width] for row in rows]).transpose(1, 2)
        if width == 0:  # a stream without a frame: NeMo's subsampling makes one of the padding
            excerpts = excerpts.new_zeros(len(rows), 1, excerpts.shape[2])
        lengths = torch.full((len(rows),), width, device=excerpts.device)
        frames, lengths = self.subsampling(x=excerpts, lengths=lengths)
        end = int(lengths[0]) if new is None else skipped + new
        return frames[:, skipped:end]

    def _move_on(self, state: EncoderState, row: int, new: int) -> None:
        before = max(state.frames[row] - OVERLAP, 0)
        state.frames[row] += new
        unneeded = self.factor * (max(state.frames[row] - OVERLAP, 0) - before)
        state.features[row] = state.features[row][:, unneeded:].clone()

    def _run_layers(self, state: EncoderState, rows: list[int], frames: torch.Tensor, final: bool) -> torch.Tensor:
        """Run all layers on new frames [R, Q, D]; returns those that come out of the last, [R, A, D]."""
        inputs = [state.frames[row] for row in rows]  # that the layer has had before, of each stream
        if frames.shape[1]:
            frames, _ = self.encoder.pos_enc(x=frames)
        for layer, cache, window, wait in zip(self.encoder.layers, state.layers, self.windows, self.waits):
            waiting = min(inputs[0], wait)
            first = [count - waiting for count in inputs]
            if waiting:
                frames = torch.cat((_of(cache.pending, rows)[:, wait - waiting :], frames), dim=1)
            waiting = 0 if final else min(wait, frames.shape[1])
            if waiting:
                pending = torch.zeros(len(rows), wait, frames.shape[2], dtype=frames.dtype, device=frames.device)
                pending[:, wait - waiting :] = frames[:, frames.shape[1] - waiting :]
                cache.pending = _replace(cache.pending, rows, pending)
            if frames.shape[1] > waiting:
                frames = self._run_layer(layer, cache, rows, frames, window, first, waiting)
            else:
                frames = frames[:, :0]
            inputs = first
        return frames if self.encoder.out_proj is None or not frames.shape[1] else self.encoder.out_proj(frames)

    def _run_layer(self, layer, cache: LayerCache, rows, frames, window: Window, first: list[int], waiting: int):
        """Run a layer on its inputs [R, Q, D], of which the last ``waiting`` are look-ahead only; returns the others.

        ``first`` has the position of the first of them in each stream.
        """
        kept = frames.shape[1] - waiting
        attention = _of(cache.attention, rows)
        if window.context.left == UNLIMITED:
            # The layer returns as many frames as it gets, so give it room for the new ones.
            attention = torch.nn.functional.pad(attention, (0, 0, kept, 0))
        cached = attention.shape[1]
        with _waiting(layer, waiting):
            outputs, attention, convolution = layer(
                x=frames,
                att_mask=self._hidden(window, cached, frames.shape[1], first),
                pos_emb=self._positions(cached, frames.shape[1]),
                cache_last_channel=attention,
                cache_last_time=_of(cache.convolution, rows),
            )
        size = cached if window.context.left != UNLIMITED else max(first) + kept
        attention = attention[:, attention.shape[1] - min(size, attention.shape[1]) :]
        convolution = convolution[..., convolution.shape[2] - cache.convolution.shape[2] :]
        cache.attention = _replace(cache.attention, rows, attention)
        cache.convolution = _replace(cache.convolution, rows, convolution)
        return outputs[:, :kept]

    def _positions(self, cached: int, new: int) -> torch.Tensor:
        """Embeddings [1, P, D] of the relative positions cached + new - 1 ... 1 - new; NeMo takes as many behind."""
        total = cached + new
        if total > self.encoder.max_audio_length:
            with torch.inference_mode(False), torch.no_grad():  # the table stays with the model, which may train later
                self.encoder.set_max_audio_length(2 * total)
        embeddings = self.encoder.pos_enc.pe
        start = embeddings.shape[1] // 2 + 1 - total
        return embeddings[:, start : start + total + new - 1]

    def _hidden(self, window: Window, cached: int, new: int, first: list[int]) -> torch.Tensor:
        """Return which of cached and new frames each new frame must not see, [R or 1, Q, C + Q] bool."""
        first = first[:1] if len(set(first)) == 1 else first
        phases = [
            min(position, cached + (position - cached) % self.chunk) for position in first
        ]  # those before: alike
        key = window, cached, new, tuple(phases)
        if key not in self._masks:
            if len(self._masks) >= KEPT_MASKS:
                self._masks.clear()
            start = torch.tensor(phases, device=self.device).view(-1, 1, 1)
            query = start + torch.arange(new, device=self.device).view(1, -1, 1)
            known = start + torch.arange(-cached, new, device=self.device).view(1, 1, -1)
            self._masks[key] = ~((known >= 0) & window.sees(query, known))
        return self._masks[key]


def _of(cache: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return cache if len(rows) == cache.shape[0] else cache[rows]


def _replace(cache: torch.Tensor, rows: list[int], new: torch.Tensor) -> torch.Tensor:
    """Return the cache [B, ...] with new rows; one that has grown to the left makes the others grow."""
    if len(rows) == cache.shape[0]:
        return new
    if new.dim() == 3 and new.shape[1] > cache.shape[1]:
        cache = torch.nn.functional.pad(cache, (0, 0, new.shape[1] - cache.shape[1], 0))
    cache[rows, cache.shape[1] - new.shape[1] :] = new
    return cache


@contextmanager
def _waiting(layer, frames: int):
    """Tell the layer's attention and convolution how many of the last frames not to remember, for one call."""
    modules = layer.self_attn, layer.conv.depthwise_conv
    before = [module.cache_drop_size for module in modules]
    for module in modules:
        module.cache_drop_size = frames
    try:
        yield
    finally:
        for module, size in zip(modules, before):
            module.cache_drop_size = size


def check_encoder_can_stream(encoder, context: AttContext) -> None:
    """Raise ValueError, with the reason, if the encoder's output cannot be computed from a stream."""
    if not isinstance(encoder, ConformerEncoder):
        raise ValueError(f"{type(encoder).__name__} cannot be streamed; the encoder must be a ConformerEncoder")
    if encoder.self_attention_model != 'rel_pos':
        raise ValueError(
            f"encoder.self_attention_model is {encoder.self_attention_model}, which cannot be streamed; use rel_pos"
        )
    if encoder.att_context_style not in STYLES:
        raise ValueError(f"encoder.att_context_style is {encoder.att_context_style}; streams need one of {STYLES}")
    with encoder.using_att_context_size(context):  # it refuses what its attention cannot follow
        for index, effective in enumerate(encoder.effective_att_contexts()):
            if effective.right == UNLIMITED:
                raise ValueError(
                    f"att_context_size {context.as_list()} cannot be streamed: the right context of layer {index} is "
                    "unlimited, so that the first frame waits for the last"
                )
    _check_convolutions(encoder)
    _check_subsampling(encoder)
    _check_adapters(encoder)


def _check_convolutions(encoder) -> None:
    if encoder.conv_context_size[1] != 0 or getattr(encoder, 'conv_context_style', 'regular') != 'regular':
        raise ValueError(
            f"encoder.conv_context_size is {list(encoder.conv_context_size)}: its convolutions are not causal; a "
            "stream needs conv_context_size: causal"
        )
    norm = encoder.layers[0].conv.norm_type
    if norm not in CONV_NORMS:
        raise ValueError(f"encoder.conv_norm_type is {norm}, which needs the whole utterance; use layer_norm")
    if encoder.reduction_position is not None:
        raise ValueError("encoder.reduction is set, which a stream cannot follow; set it null")


def _check_subsampling(encoder) -> None:
    subsampling = getattr(encoder.pre_encode, 'pre_encode', encoder.pre_encode)
    if not isinstance(subsampling, ConvSubsampling) or subsampling._subsampling not in SUBSAMPLINGS:
        name = getattr(subsampling, '_subsampling', type(subsampling).__name__)
        raise ValueError(f"encoder.subsampling is {name}; streams need one of {SUBSAMPLINGS}, causal")
    if not subsampling.is_causal:
        raise ValueError("encoder.causal_downsampling is false; a stream needs causal_downsampling: true")
    if subsampling.subsampling_conv_chunking_factor != 1:
        raise ValueError(
            "encoder.subsampling_conv_chunking_factor is "
            f"{subsampling.subsampling_conv_chunking_factor}; streams need 1, for others treat the end differently"
        )


def _check_adapters(encoder) -> None:
    for index, layer in enumerate(encoder.layers):
        enabled = layer.get_enabled_adapters() if layer.is_adapter_available() else []
        attending = [name for name in enabled if isinstance(layer.adapter_layer[name], MultiHeadAttention)]
        if attending:
            raise ValueError(
                f"encoder.layers[{index}] has the attention adapter {attending[0]!r}, which remembers no earlier frames; "
                "disable it, or use linear adapters"
            )
