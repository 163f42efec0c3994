# SPDX-License-Identifier: Apache-2.0
"""All that live streams remember, as values that can be saved and restored.

Shapes: B streams, N samples, F features (or the encoder's width), T feature frames, M mask frames, S target frames,
D the encoder's width, C cached frames or classes, A attention frames, H codebooks.
"""

from dataclasses import dataclass, field

import torch

from nemo.collections.asr.modules.ssl_modules.masked_time_line import MaskedTimeLine

# Of what StreamState.to_dict returns; 1 had none written down, 2 had the targets in what masking remembers.
VERSION = 3


@dataclass
class SampleTail:
    """The end of one stream of samples, and its position."""

    samples: torch.Tensor
    """Those that coming frames need, [N] float32."""
    received: int = 0
    """Samples received so far."""
    frames: int = 0
    """Feature frames given out so far."""


@dataclass
class LayerCache:
    """What one layer remembers; frames end at the right, those before a stream began are zero and hidden."""

    attention: torch.Tensor
    """Inputs of the attention, [B, C, D]."""
    convolution: torch.Tensor
    """Inputs of the convolution, [B, D, kernel - 1]."""
    pending: torch.Tensor
    """Inputs of the layer that still wait for their right context, [B, right, D]."""


@dataclass
class EncoderState:
    """The state of a batch of streams between the features and the encoder's outputs."""

    features: list[torch.Tensor]
    """For each stream the features that coming encoder frames need, [F, T]."""
    received: list[int]
    """Feature frames received by each stream."""
    frames: list[int]
    """Encoder frames that each stream has given to the layers."""
    layers: list[LayerCache] = field(default_factory=list)


@dataclass
class TargetStream:
    """The state of one stream of which targets are made."""

    waiting: torch.Tensor
    """Mask frames that do not make a whole target yet, [F, M]."""
    total: torch.Tensor
    """Sum over the frames received, [F] float64."""
    squares: torch.Tensor
    """Sum of their squares, [F] float64."""
    count: int = 0
    """Mask frames received."""


@dataclass
class MaskedStream:
    """The state of one stream that is masked."""

    recent: torch.Tensor
    """The last mask frames as they were received, as far as a mask is drawn over them, [F, M]."""
    masks: torch.Tensor | None = None
    """Of frames without a loss so far, [1, M]."""
    tokens: torch.Tensor | None = None
    """Targets without a loss so far, [S] or [S, H]."""
    log_probs: torch.Tensor | None = None
    """Predictions without a loss so far, behind ``decoder_offset`` that the loss drops, [A, C] or [A, C, H]."""
    time_line: MaskedTimeLine | None = None
    """What was drawn so far; None for a masking module that does not take it."""


@dataclass
class SurprisedStream:
    """The state of one stream whose tokens are compared with what was predicted of them."""

    start: int
    """Index of the token whose surprise is the next to be known."""
    unasked: int
    """Tokens still to come that no frame is asked for: those before the first frame's."""
    tokens: torch.Tensor | None = None
    """Tokens without a prediction so far, [S] or [S, H]."""
    log_probs: torch.Tensor | None = None
    """Predictions at the first horizon without a token so far, [A, C] or [A, C, H]."""


@dataclass
class StreamState:
    """The state of a session: of each stream, or of all of them in one batch."""

    ended: list[bool]
    """For each stream, whether it has ended."""
    tails: list[SampleTail]
    """The samples of each stream that coming features need."""
    encoder: EncoderState
    """The state between the features and the encoder's outputs."""
    masked: list[MaskedStream | None]
    """What masking remembers of each stream; None without masking."""
    targets: list[TargetStream | None]
    """What the targets of each stream need of its past; None where none are made."""
    surprised: list[SurprisedStream | None]
    """What was predicted of each stream and is not known yet; None where nobody asks."""

    def to_dict(self) -> dict:
        """Return a copy as plain containers and tensors, for torch.save or pickle."""
        return {'version': VERSION, **copy_tensors(self._plain())}

    @classmethod
    def from_dict(cls, state: dict, masking, device) -> 'StreamState':
        """Return a copy of what :meth:`to_dict` returned, in this version or an earlier one.

        Args:
            state: the dict.
            masking: the session's ``LiveMasking``; None without masking.
            device: where the tensors go.
        """
        state = copy_tensors(state, device)
        version = state.get('version', 1)
        if version == 1:
            state['masked'] = [_masked_of_version_1(stream, masking) for stream in state['masked']]
        if version < 3:
            state['targets'] = [_targets_of_version_2(stream) for stream in state['masked']]
            state['surprised'] = [None] * len(state['masked'])
        layers = [LayerCache(**layer) for layer in state['encoder'].pop('layers')]
        return cls(
            state['ended'],
            [SampleTail(**tail) for tail in state['tails']],
            EncoderState(**state['encoder'], layers=layers),
            [None if stream is None else _masked_stream(stream) for stream in state['masked']],
            [None if stream is None else TargetStream(**stream) for stream in state['targets']],
            [None if stream is None else SurprisedStream(**stream) for stream in state['surprised']],
        )

    def bytes(self) -> int:
        """Return how many bytes its tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self._plain()))

    def _plain(self) -> dict:
        encoder = {name: getattr(self.encoder, name) for name in ('features', 'received', 'frames')}
        return {
            'ended': self.ended,
            'tails': [vars(tail) for tail in self.tails],
            'encoder': {**encoder, 'layers': [vars(cache) for cache in self.encoder.layers]},
            'masked': [None if stream is None else _plain_masked(stream) for stream in self.masked],
            'targets': [None if stream is None else vars(stream) for stream in self.targets],
            'surprised': [None if stream is None else vars(stream) for stream in self.surprised],
        }


def _plain_masked(stream: MaskedStream) -> dict:
    time_line = stream.time_line
    return {**vars(stream), 'time_line': None if time_line is None else vars(time_line)}


def _masked_stream(stream: dict) -> MaskedStream:
    time_line = stream['time_line']
    return MaskedStream(**{**stream, 'time_line': None if time_line is None else MaskedTimeLine(**time_line)})


def _masked_of_version_1(stream: dict | None, masking) -> dict | None:
    """Read what masking remembered in version 1.

    Some names were others, there was always a dimension for codebooks, of the predictions those that the loss drops
    were gone already, and what was masked before was not remembered.
    """
    if stream is None:
        return None
    stream = dict(stream, recent=stream['window'], waiting=stream['unaimed'])
    dropped = masking.decoder_offset - stream['unheard']
    for name in ('window', 'unaimed', 'unheard'):
        del stream[name]
    if stream['log_probs'] is not None:
        stream['log_probs'] = torch.nn.functional.pad(stream['log_probs'], (0, 0, 0, 0, dropped, 0))
    stream['time_line'] = masking.time_line_after(stream['count'], stream['recent'])
    if masking.squeezes_codebooks:
        for name in ('log_probs', 'tokens'):
            stream[name] = None if stream[name] is None else stream[name].squeeze(-1)
    return stream


def _targets_of_version_2(stream: dict | None) -> dict | None:
    """Take out of what masking remembered in version 2 what belongs to the targets."""
    return None if stream is None else {name: stream.pop(name) for name in ('waiting', 'total', 'squares', 'count')}


def joined(earlier: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """Join what waits with what is new along the first dimension; None is nothing."""
    if earlier is None or new is None:
        return new if earlier is None else earlier
    return torch.cat((earlier, new))


def copy_tensors(state, device=None):
    """Copy nested containers with their tensors, which go to ``device`` if given."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone() if device is None else state.detach().to(device, copy=True)
    if isinstance(state, dict):
        return {name: copy_tensors(value, device) for name, value in state.items()}
    return [copy_tensors(value, device) for value in state] if isinstance(state, list) else state


def _tensors(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for value in values for tensor in _tensors(value)]
