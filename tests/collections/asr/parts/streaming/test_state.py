# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""That a stream goes on from a saved state is tested in ``test_session.py``; here is what the state holds."""

import io

import pytest
import torch

from nemo.collections.asr.parts.streaming.state import VERSION, EncoderState, LayerCache, SampleTail, StreamState


def state():
    cache = LayerCache(torch.randn(1, 4, 16), torch.randn(1, 16, 2), torch.zeros(1, 0, 16))
    encoder = EncoderState(features=[torch.randn(80, 9)], received=[33], frames=[4], layers=[cache])
    return StreamState([False], [SampleTail(torch.randn(400), received=5680, frames=33)], encoder, [None])


@pytest.mark.unit
def test_it_is_the_same_after_being_saved_without_pickled_code():
    before, file = state(), io.BytesIO()
    torch.save(before.to_dict(), file)
    file.seek(0)
    after = StreamState.from_dict(torch.load(file, weights_only=True), masking=None, device='cpu')
    assert torch.equal(after.tails[0].samples, before.tails[0].samples)
    assert (after.tails[0].received, after.tails[0].frames) == (5680, 33)
    assert torch.equal(after.encoder.layers[0].attention, before.encoder.layers[0].attention)
    assert (after.ended, after.masked, after.encoder.received) == ([False], [None], [33])
    assert before.to_dict()['version'] == VERSION


@pytest.mark.unit
def test_a_copy_shares_no_tensor():
    before = state()
    copy = before.to_dict()
    before.encoder.layers[0].attention.zero_()
    assert copy['encoder']['layers'][0]['attention'].any()
    again = StreamState.from_dict(copy, masking=None, device='cpu')
    again.encoder.layers[0].attention.zero_()
    assert copy['encoder']['layers'][0]['attention'].any()


@pytest.mark.unit
def test_its_size_is_that_of_its_tensors():
    assert state().bytes() == 4 * (400 + 80 * 9 + 4 * 16 + 16 * 2)
