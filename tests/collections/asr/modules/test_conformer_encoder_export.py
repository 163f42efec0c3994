# SPDX-License-Identifier: Apache-2.0
"""Exported encoders with caches: ONNX in onnxruntime, and TorchScript, step by step over a stream.

Shapes: B batch, F features, T feature frames.
"""

import pytest
import torch
from onnxruntime import InferenceSession
from tiny_encoder import tiny_encoder

pytestmark = pytest.mark.filterwarnings('ignore:::torch', 'ignore::torch.jit.TracerWarning')
STEPS = 10
CHUNKED = dict(att_context_style='chunked_limited', att_context_size=[8, 3])
ENCODERS = {
    'one context': dict(att_context_size=[8, 0]),
    'layers': dict(att_context_size=[8, 0], layer_att_context_size=[[2, 0], [8, 0]]),
    'chunked layers, sdpa': dict(CHUNKED, layer_att_context_size=[[4, 3], [8, 1]], use_pytorch_sdpa=True),
    'look-ahead': dict(att_context_size=[6, 1], layer_att_context_size=[[6, 1], [4, 0]]),
}


def export(encoder, path):
    """Export as NeMo does and return a function of tensors."""
    encoder.export(str(path))
    if path.suffix == '.ts':
        return torch.jit.load(str(path))
    session = InferenceSession(str(path), providers=['CPUExecutionProvider'])
    names = [entry.name for entry in session.get_inputs()]

    def run(*tensors):
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors)})
        return [torch.from_numpy(output) for output in outputs]

    return run


def stream(step, encoder):
    """Run a cached step over a stream; returns its encoder frames [1, D, A] and the last caches."""
    settings = encoder.streaming_cfg
    before, size, shift = settings.pre_encode_cache_size[1], settings.chunk_size[1], settings.shift_size[1]
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, 8, before + size + shift * (STEPS - 1), generator=generator)
    features[:, :, :before] = 0  # a stream's first window is filled up
    channel, time, length = encoder.get_initial_cache_state(batch_size=1)
    caches, encoded = [channel.transpose(0, 1), time.transpose(0, 1), length], []
    for start in range(0, STEPS * shift, shift):
        window = features[:, :, start : start + before + size]
        with torch.no_grad():
            frames, _, *caches = step(window, torch.tensor([window.shape[2]]), *caches)
        encoded.append(frames)
    return torch.cat(encoded, dim=2), caches


@pytest.mark.parametrize(
    'name, suffix',
    [(name, '.onnx') for name in ENCODERS] + [('layers', '.ts'), ('chunked layers, sdpa', '.ts')],
)
def test_an_exported_stream_is_that_of_pytorch(name, suffix, tmp_path):
    allowed = {'.onnx': 1e-4, '.ts': 1e-6}[suffix]
    encoder = tiny_encoder(n_layers=2, **ENCODERS[name])
    encoder.export_cache_support = True
    encoder.setup_streaming_params()
    expected, caches = stream(encoder.forward_for_export, encoder)
    found, found_caches = stream(export(encoder, tmp_path / f'encoder{suffix}'), encoder)
    assert expected.shape[2] >= STEPS
    for ours, theirs in zip([found, *found_caches], [expected, *caches]):
        torch.testing.assert_close(ours, theirs, atol=allowed, rtol=0)
    if name == 'layers':
        encoder.set_layer_att_context_size(None)
        assert (stream(encoder.forward_for_export, encoder)[0] - found).abs().max() > 1e-2


@pytest.mark.parametrize('suffix', ['.onnx', '.ts'])
def test_a_whole_utterance_of_any_length(suffix, tmp_path):
    encoder = tiny_encoder(n_layers=2, att_context_size=[4, 0], layer_att_context_size=[[0, [2, 0]]])
    exported = export(encoder, tmp_path / f'encoder{suffix}')
    for frames in (100, 256, 500):
        features, lengths = torch.randn(2, 8, frames), torch.tensor([frames, frames // 2])
        with torch.no_grad():
            expected = encoder(audio_signal=features, length=lengths)
            found = exported(features, lengths)
        assert torch.equal(found[1], expected[1])
        for row, length in enumerate(expected[1]):
            torch.testing.assert_close(found[0][row, :, :length], expected[0][row, :, :length], atol=1e-4, rtol=0)
