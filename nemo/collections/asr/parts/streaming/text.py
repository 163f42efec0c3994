# SPDX-License-Identifier: Apache-2.0
"""The text of live streams: tokens that are decided on, frame by frame, by a CTC, an RNNT or a hybrid model.

Greedy decoding decides once and for all: what was said stays said, and only the last word may still grow. A CTC path loses its
repetitions and blanks here; an RNNT's is NeMo's own decoding, which goes on from the hypotheses that it has returned.

Shapes: B streams, R rows of them, D the encoder's width, A attention frames.
"""

import dataclasses

import torch

from nemo.collections.asr.parts.streaming.decoding import decode_frames
from nemo.collections.asr.parts.streaming.words import Spelling, Token, Word
from nemo.collections.asr.parts.utils.rnnt_utils import Hypothesis

PLAIN = (int, float, str, bool, type(None), torch.Tensor)


@dataclasses.dataclass
class Transcript:
    """What one stream has said so far."""

    text: str
    """All of it, the word that may still grow included."""
    words: list[Word]
    """Its words, with their times."""
    final: bool
    """Whether the stream has ended."""

    @property
    def final_words(self) -> list[Word]:
        """The words that will not change any more: all but the last one, until the stream ends."""
        return self.words if self.final else self.words[:-1]


class LiveText:
    """Turns encoder frames, as they come, into transcripts.

    Args:
        model: a CTC, RNNT or hybrid model of NeMo's; a hybrid one decodes as its ``cur_decoder`` says.
        batch: B.
        frame_seconds: of an attention frame.

    Raises:
        ValueError: if the model has no such decoder, or its decoding is not greedy.
    """

    def __init__(self, model, batch: int, frame_seconds: float):
        self.batch = batch
        self._steps = _decoding_of(model)
        self.spelling = Spelling(self._steps.decoding, frame_seconds)
        self.reset()

    def reset(self) -> None:
        """Begin all streams anew."""
        self._tokens: list[list[Token]] = [[] for _ in range(self.batch)]
        self._frames = [0] * self.batch
        self._memory: list = [None] * self.batch

    def forget(self, rows: list[int]) -> None:
        """Begin some streams anew."""
        for row in rows:
            self._tokens[row], self._frames[row], self._memory[row] = [], 0, None

    def take(self, encoded: torch.Tensor, lengths: list[int]) -> None:
        """Take new frames.

        Args:
            encoded: [B, D, A].
            lengths: how many of them each stream has.
        """
        rows = [row for row, length in enumerate(lengths) if length]
        if not rows:
            return
        some = encoded if len(rows) == self.batch else encoded[rows]
        counts, memory = [lengths[row] for row in rows], [self._memory[row] for row in rows]
        found, memory = self._steps.decode(some, counts, memory, [self._frames[row] for row in rows])
        for row, tokens, remembered, count in zip(rows, found, memory, counts):
            self._tokens[row] += tokens
            self._memory[row] = remembered
            self._frames[row] += count

    def transcripts(self, ended) -> list[Transcript]:
        """Return what each stream has said so far; ``ended`` [B] says which have ended."""
        return [
            Transcript(self.spelling.text(tokens), self.spelling.words(tokens), bool(final))
            for tokens, final in zip(self._tokens, ended)
        ]

    def state(self) -> dict:
        """Return a copy of the state: plain containers and tensors."""
        tokens = [[[each.token, each.frame] for each in of] for of in self._tokens]
        memory = [self._steps.to_plain(each) for each in self._memory]
        return {'tokens': tokens, 'frames': list(self._frames), 'memory': memory}

    def load(self, state: dict) -> None:
        """Go on from a saved state."""
        self._tokens = [[Token(*pair) for pair in of] for of in state['tokens']]
        self._frames = list(state['frames'])
        self._memory = [self._steps.from_plain(each) for each in state['memory']]


class _CTC:
    """Greedy CTC: what is remembered of a stream is the class of its last frame."""

    def __init__(self, decoder, decoding, blank: int):
        self.decoder, self.decoding, self.blank = decoder, decoding, blank

    def decode(self, encoded, counts: list[int], memory: list, first: list[int]):
        """Return the new tokens of each row, and what to remember."""
        path = decode_frames(self.decoder, encoded).argmax(dim=2).tolist()
        found = []
        for row, count in enumerate(counts):
            before = [memory[row], *path[row][: count - 1]]
            found.append(
                [
                    Token(token, first[row] + frame)
                    for frame, (token, earlier) in enumerate(zip(path[row][:count], before))
                    if token not in (earlier, self.blank)
                ]
            )
        return found, [path[row][count - 1] for row, count in enumerate(counts)]

    @staticmethod
    def to_plain(memory: int | None) -> int | None:
        """Return what is remembered, as it is."""
        return memory

    from_plain = to_plain


class _RNNT:
    """Greedy RNNT by NeMo's decoding, which goes on from hypotheses; each remembers the state of the prediction network."""

    def __init__(self, decoding):
        self.decoding = decoding

    def decode(self, encoded, counts: list[int], memory: list, first: list[int]):
        """Return the new tokens of each row, and what to remember."""
        found = [[] for _ in counts]
        done, total = 0, max(counts)
        while done < total:
            at = [before + done for before in first]
            # NeMo tells frames from the beginning of the stream or of the piece; pieces no longer than what came before
            # them tell which.
            most = min([frame for frame in at if frame], default=total)
            piece = encoded[:, :, done : done + most]
            some = [row for row, count in enumerate(counts) if count > done]
            lengths = torch.tensor([min(counts[row] - done, most) for row in some], device=encoded.device)
            hypotheses = self.decoding.rnnt_decoder_predictions_tensor(
                piece[some], lengths, return_hypotheses=True, partial_hypotheses=[_go_on(memory[row]) for row in some]
            )
            for row, hypothesis in zip(some, hypotheses):
                found[row] += _tokens_of(hypothesis, at[row])
                memory[row] = hypothesis
            done += most
        return found, memory

    @staticmethod
    def to_plain(memory: Hypothesis | None) -> dict | None:
        """Return a hypothesis as plain containers and tensors.

        Raises:
            ValueError: if its state is of a kind that cannot be.
        """
        if memory is None:
            return None
        return {'state': _plain(memory.dec_state), 'last_token': _plain(memory.last_token)}

    @staticmethod
    def from_plain(memory: dict | None) -> Hypothesis | None:
        """Return the hypothesis of what :meth:`to_plain` returned."""
        if memory is None:
            return None
        state = _unplain(memory['state'])
        return Hypothesis(0.0, [], dec_state=state, last_token=_unplain(memory['last_token']))


def _go_on(memory: Hypothesis | None) -> Hypothesis | None:
    """Return a hypothesis that goes on, with nothing said yet."""
    if memory is None:
        return None
    return Hypothesis(0.0, [], timestamp=[], dec_state=memory.dec_state, last_token=memory.last_token)


def _tokens_of(hypothesis: Hypothesis, at: int) -> list[Token]:
    """Return what a hypothesis says, of a piece that begins with frame ``at``."""
    timestamp = hypothesis.timestamp
    frames = [int(frame) for frame in (timestamp['timestep'] if isinstance(timestamp, dict) else timestamp)]
    tokens = [int(token) for token in hypothesis.y_sequence]
    return [Token(token, frame if frame >= at else at + frame) for token, frame in zip(tokens, frames)]


def _plain(state):
    if isinstance(state, PLAIN):
        return state.clone() if isinstance(state, torch.Tensor) else state
    if isinstance(state, (list, tuple)):
        return {'kind': 'list' if isinstance(state, list) else 'tuple', 'items': [_plain(item) for item in state]}
    if dataclasses.is_dataclass(state):
        fields = {field.name: _plain(getattr(state, field.name)) for field in dataclasses.fields(state)}
        return {'kind': f'{type(state).__module__}.{type(state).__qualname__}', 'fields': fields}
    raise ValueError(
        f"state_dict: the decoder's state has a {type(state).__name__}, which cannot be saved as plain values"
    )


def _unplain(state):
    if not isinstance(state, dict):
        return state.clone() if isinstance(state, torch.Tensor) else state
    if 'items' in state:
        items = [_unplain(item) for item in state['items']]
        return items if state['kind'] == 'list' else tuple(items)
    return _state_class(state['kind'])(**{name: _unplain(value) for name, value in state['fields'].items()})


def _state_class(kind: str):
    """Return NeMo's class of a decoder's state; only classes of its transducer decoding are looked up."""
    import importlib

    module, _, name = kind.rpartition('.')
    if not module.startswith('nemo.collections.asr.parts.submodules.transducer_decoding'):
        raise ValueError(f"load_state_dict: {kind} is no state of a decoder")
    return getattr(importlib.import_module(module), name)


def _decoding_of(model):
    """Return what decodes a model's frames."""
    if getattr(model, 'joint', None) is not None and getattr(model, 'cur_decoder', 'rnnt') == 'rnnt':
        return _RNNT(_greedy(model.decoding, model))
    decoder = getattr(model, 'ctc_decoder', None) or getattr(model, 'decoder', None)
    decoding = getattr(model, 'ctc_decoding', None) or getattr(model, 'decoding', None)
    if decoding is None or 'encoder_output' not in (getattr(decoder, 'input_types', None) or {}):
        raise ValueError(f"text needs a CTC, RNNT or hybrid model; {type(model).__name__} is none")
    return _CTC(decoder, _greedy(decoding, model), decoder.num_classes_with_blank - 1)


def _greedy(decoding, model):
    strategy = decoding.cfg.get('strategy', 'greedy')
    if not str(strategy).startswith('greedy'):
        raise ValueError(
            f"{type(model).__name__}'s decoding.strategy is {strategy}; live text needs greedy or greedy_batch, for others "
            "change what was said"
        )
    return decoding
