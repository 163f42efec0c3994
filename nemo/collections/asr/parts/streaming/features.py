# SPDX-License-Identifier: Apache-2.0
"""Features of live streams, frame for frame those that the preprocessor computes of the whole.

The preprocessor itself is run, on excerpts that begin a few frames early: the frames whose own samples, and the one
before them that preemphasis looks at, are all there are kept. Frame t is centred on sample t * hop.

Shapes: B streams, N samples, F features, T feature frames.
"""

from collections.abc import Mapping

import torch

from nemo.collections.asr.parts.preprocessing.features import FilterbankFeatures
from nemo.collections.asr.parts.streaming.state import SampleTail

WHOLE_UTTERANCE = ('per_feature', 'all_features')  # normalisations that need it


class StreamingFeatures:
    """A mel front end for streams; the state is in the :class:`SampleTail` of each.

    Args:
        preprocessor: an ``AudioToMelSpectrogramPreprocessor``, in eval mode, that needs no whole utterance.

    Raises:
        ValueError: if its features cannot stream, with the reason.
    """

    def __init__(self, preprocessor: torch.nn.Module):
        featurizer = getattr(preprocessor, 'featurizer', None)
        check_features_can_stream(preprocessor, featurizer)
        self.preprocessor = preprocessor
        self.hop = featurizer.hop_length
        self.sample_rate = featurizer.sample_rate
        self.features = featurizer.nfilt * featurizer.frame_splicing
        half = featurizer.n_fft // 2
        # NeMo's window may be shorter than the transform, whose other samples count for nothing.
        self.look_ahead = (featurizer.n_fft - featurizer.win_length) // 2 + featurizer.win_length - half
        self._margin = -(-(half + 1) // self.hop)  # frames of an excerpt that lack samples on their left
        self._length_of = featurizer.get_seq_len

    @property
    def device(self) -> torch.device:
        """The device of the featurizer's buffers, where its input must be."""
        return self.preprocessor.featurizer.fb.device

    def new_tail(self) -> SampleTail:
        """The state of a stream before its first sample."""
        return SampleTail(torch.zeros(0, device=self.device))

    def step(self, tails: list[SampleTail], pieces: list[torch.Tensor], ended: list[bool]) -> list[torch.Tensor]:
        """Take samples and return the feature frames that they complete; the tails move on.

        Args:
            tails: the state of each stream.
            pieces: new samples of each stream, [N] float32, any number.
            ended: for each stream, whether these are its last samples.

        Returns:
            For each stream its new frames, [F, T].
        """
        for tail, piece in zip(tails, pieces):
            tail.samples = torch.cat((tail.samples, piece))
            tail.received += piece.shape[0]
        new = [self._frames_in(tail.received, end) - tail.frames for tail, end in zip(tails, ended)]
        dtype = self.preprocessor.dtype_sentinel_tensor.dtype
        frames = [torch.zeros(self.features, 0, dtype=dtype, device=self.device)] * len(tails)
        rows = [row for row, count in enumerate(new) if count]
        if rows:
            for row, found in zip(rows, self._features_of([tails[row].samples for row in rows])):
                first = min(tails[row].frames, self._margin)
                frames[row] = found[:, first : first + new[row]]
                self._move_on(tails[row], new[row])
        return frames

    def _features_of(self, excerpts: list[torch.Tensor]) -> torch.Tensor:
        lengths = torch.tensor([excerpt.shape[0] for excerpt in excerpts], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence(excerpts, batch_first=True)
        return self.preprocessor(input_signal=padded, length=lengths)[0]

    def _frames_in(self, samples: int, ended: bool) -> int:
        """How many frames so many samples from the beginning complete."""
        whole = int(self._length_of(torch.tensor(samples))) if samples else 0
        if ended:
            return max(whole, 0)
        return max(min(whole, (samples - self.look_ahead) // self.hop + 1), 0)

    def _move_on(self, tail: SampleTail, new: int) -> None:
        before = max(tail.frames - self._margin, 0)
        tail.frames += new
        # a copy, for a view would keep all that was ever fed at once
        tail.samples = tail.samples[(max(tail.frames - self._margin, 0) - before) * self.hop :].clone()


def check_features_can_stream(preprocessor, featurizer) -> None:
    """Raise ValueError, with the reason, if the features cannot be computed from a stream."""
    if not isinstance(featurizer, FilterbankFeatures):
        raise ValueError(
            f"{type(preprocessor).__name__} cannot be streamed; the preprocessor must be an "
            "AudioToMelSpectrogramPreprocessor (without use_torchaudio)"
        )
    normalize = featurizer.normalize
    if isinstance(normalize, str) and normalize in WHOLE_UTTERANCE:
        raise ValueError(
            f"preprocessor.normalize is {normalize}, which needs the whole utterance; a stream needs NA or fixed "
            "statistics (fixed_mean and fixed_std, see compute_feature_stats.py)"
        )
    if normalize and not isinstance(normalize, (str, Mapping)):
        raise ValueError(f"preprocessor.normalize is {normalize!r}; it must be NA or fixed statistics")
    if featurizer.exact_pad:
        raise ValueError("preprocessor.exact_pad is true; NeMo then drops the utterance's last samples: set it false")
