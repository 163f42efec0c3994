# SPDX-License-Identifier: Apache-2.0
"""Models that stream, and ragged streams of noise, cut in any way, for the tests of live streaming."""

import functools
import sys

import torch
from hypothesis import strategies as st
from tiny_nest import POST_CONV, SAMPLE_RATE, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel, EncDecMaskedTokenPredModel
from nemo.collections.asr.parts.streaming.session import StreamingOutput

THREE_LAYERS = 'model.encoder.n_layers=3'
CHUNKED = ('model.encoder.att_context_style=chunked_limited', 'model.encoder.att_context_size=[[8,3],[4,1]]')
SCHEDULE = '+model.encoder.layer_att_context_size=[[0,[2,0]],[1,[4,0]],[2,[8,0]]]'
CASES = {  # name: overrides, contexts
    'regular': ((), ([4, 0], [10, 0], [0, 0], [-1, 0])),
    'look-ahead': (('model.encoder.att_context_size=[[6,2]]',), ([6, 2], [-1, 1])),
    'factor 4': (('model.encoder.subsampling_factor=4',), ([6, 0], [-1, 0])),
    'striding': (('model.encoder.subsampling=striding', 'model.encoder.subsampling_factor=2'), ([6, 0],)),
    'chunked': (CHUNKED, ([8, 3], [4, 1], [6, 0], [-1, 3], [0, 3])),
    'schedule': ((SCHEDULE,), ([6, 0], [-1, 0])),
    'schedule, look-ahead': (
        ('model.encoder.att_context_size=[[8,3]]', '+model.encoder.layer_att_context_size=[[4,1],[8,3],[2,0]]'),
        ([8, 3], [-1, 3]),
    ),
    'schedule, chunked': ((*CHUNKED, '+model.encoder.layer_att_context_size=[[4,1],[8,-1],[-1,0]]'), ([8, 3],)),
    'sdpa': (('+model.encoder.use_pytorch_sdpa=true',), ([4, 0], [-1, 0])),
    'batch norm': (('model.encoder.conv_norm_type=batch_norm',), ([4, 0],)),
    'post conv': (POST_CONV, ([4, 0],)),
    'codebooks': (('model.num_books=2',), ([4, 0],)),
}


@functools.cache
def model_of(case: str):
    clean = case in ('post conv', 'factor 4', 'striding')
    cls = EncDecMaskedTokenPredModel if clean else EncDecDenoiseMaskedTokenPredModel
    return tiny_model(THREE_LAYERS, *CASES[case][0], cls=cls).eval()


PIECES = st.lists(st.one_of(st.integers(1, 400), st.integers(1, 6000), st.integers(1, 200000)), min_size=1, max_size=5)
TOTALS = st.one_of(st.integers(0, 2000), st.integers(0, 3 * SAMPLE_RATE))


@st.composite
def ragged(draw):
    """Lengths of streams and sizes of pieces: some 40 steps and no more. Offline fails where all streams are empty."""
    lengths, sizes = draw(st.lists(TOTALS, min_size=1, max_size=3)), draw(PIECES)
    most = 40 * max(sum(sizes) // len(sizes), 25)
    return [max(min(lengths[0], most), 1), *(min(length, most) for length in lengths[1:])], sizes


RAGGED = ragged()


def noise(*shape, seed=0):
    """Noise whose colour and level change, so that frames differ."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(shape[0], shape[1] // 1500 + 1, generator=generator).repeat_interleave(1500, dim=1)
    return torch.randn(*shape, generator=generator) * 0.3 * level[:, : shape[1]] ** 3


def stream(session, samples, lengths, sizes) -> StreamingOutput:
    """Feed ragged streams in pieces of these sizes, in turn; each ends with its last samples, or later."""
    position, outputs, index = 0, [], 0
    while position < max(lengths):
        size = sizes[index % len(sizes)]
        counts = [max(min(length - position, size), 0) for length in lengths]
        ended = [index % 2 == 0 and 0 <= length - position <= size for length in lengths]
        outputs.append(session.step(samples[:, position : position + size], counts, ended))
        position, index = position + size, index + 1
    return StreamingOutput.concatenate(outputs + ([] if all(session.ended) else [session.finish()]))


@torch.no_grad()
def offline(model, samples, lengths, context):
    """Return what the model's own forward gives in eval mode: features, encoded and log-probabilities with lengths."""
    with model.encoder.using_att_context_size(context):
        features, feature_lengths = model.preprocessor(input_signal=samples, length=torch.tensor(lengths))
        encoded, encoded_lengths = model.encoder(audio_signal=features, length=feature_lengths)
    return features, feature_lengths, encoded, encoded_lengths, model.decoder(encoder_output=encoded)


def check_row(model, context, samples, encoded: list, atol=1e-4) -> None:
    """Compare the frames [D, A] that a stream gave with offline; samples are [1, N]."""
    count = [samples.shape[1]]
    if count == [0]:  # offline fails where all are empty
        samples, count = torch.zeros(2, 400), [0, 400]
    expected, lengths = offline(model, samples, count, context)[2:4]
    found = torch.cat(encoded, dim=1)
    assert found.shape[1] == lengths[0]
    torch.testing.assert_close(found, expected[0, :, : lengths[0]], atol=atol, rtol=0)


def calls_of(work) -> int:
    """How many functions of Python and of C are called."""
    counted = 0

    def count(frame, event, argument):
        nonlocal counted
        counted += event in ('call', 'c_call')

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counted
