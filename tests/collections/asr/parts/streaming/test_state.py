# SPDX-License-Identifier: Apache-2.0
"""That a stream goes on from a saved state is tested in ``test_session.py``; here is what the state holds."""

import io

import pytest
import torch
from live_streams import noise
from tiny_nest import tiny_model

from nemo.collections.asr.parts.streaming.session import StreamingSession
from nemo.collections.asr.parts.streaming.state import (
    VERSION,
    EncoderState,
    LayerCache,
    SampleTail,
    StreamState,
    SurprisedStream,
    TargetStream,
    joined,
)


def state():
    cache = LayerCache(torch.randn(1, 4, 16), torch.randn(1, 16, 2), torch.zeros(1, 0, 16))
    encoder = EncoderState(features=[torch.randn(80, 9)], received=[33], frames=[4], layers=[cache])
    sums = torch.ones(80, dtype=torch.float64)
    targets = TargetStream(torch.randn(80, 1), sums, 2 * sums, count=33)
    surprised = SurprisedStream(start=4, unasked=0, log_probs=torch.randn(1, 32))
    tails = [SampleTail(torch.randn(400), received=5680, frames=33)]
    return StreamState([False], tails, encoder, [None], [targets], [surprised])


def test_it_is_the_same_after_being_saved_without_pickled_code():
    before, file = state(), io.BytesIO()
    torch.save(before.to_dict(), file)
    file.seek(0)
    after = StreamState.from_dict(torch.load(file, weights_only=True), masking=None, device='cpu')
    assert torch.equal(after.tails[0].samples, before.tails[0].samples)
    assert (after.tails[0].received, after.tails[0].frames) == (5680, 33)
    assert torch.equal(after.encoder.layers[0].attention, before.encoder.layers[0].attention)
    assert (after.ended, after.masked, after.encoder.received) == ([False], [None], [33])
    assert torch.equal(after.targets[0].squares, before.targets[0].squares) and after.targets[0].count == 33
    assert torch.equal(after.surprised[0].log_probs, before.surprised[0].log_probs) and after.surprised[0].start == 4
    assert before.to_dict()['version'] == VERSION


def test_a_copy_shares_no_tensor():
    before = state()
    copy = before.to_dict()
    before.encoder.layers[0].attention.zero_()
    assert copy['encoder']['layers'][0]['attention'].any()
    again = StreamState.from_dict(copy, masking=None, device='cpu')
    again.encoder.layers[0].attention.zero_()
    assert copy['encoder']['layers'][0]['attention'].any()


def test_its_size_is_that_of_its_tensors():
    assert state().bytes() == 4 * (400 + 80 * 9 + 4 * 16 + 16 * 2 + 80 + 32) + 8 * (80 + 80)


def test_what_waits_and_what_is_new_are_joined():
    assert joined(None, None) is None
    assert joined(torch.tensor([1]), None).tolist() == joined(None, torch.tensor([1])).tolist() == [1]
    assert joined(torch.tensor([1]), torch.tensor([2, 3])).tolist() == [1, 2, 3]


def written_by_version_2(state):
    """A session's state as version 2 wrote it: what targets need was a part of what masking remembered."""
    targets = state.pop('targets')
    del state['surprised'], state['settings']['return_surprise']
    masked = [{**stream, **own} if stream else None for stream, own in zip(state['masked'], targets)]
    return {**state, 'version': 2, 'masked': masked}


def written_by_version_1(state, decoder_offset):
    """A session's state as version 1 wrote it, with its names, and without the predictions that the loss drops."""
    state = written_by_version_2(state)
    del state['version']
    for stream in state['masked']:
        if stream is not None:
            del stream['time_line']
            stream['window'], stream['unaimed'] = stream.pop('recent'), stream.pop('waiting')
            stream['log_probs'], stream['unheard'] = stream['log_probs'][decoder_offset:], 0
    return state


@pytest.mark.parametrize('apply_mask', [False, True])
def test_states_of_earlier_versions_go_on(apply_mask):
    model = tiny_model('model.masking.mask_prob=0.03').eval()
    samples = noise(1, 24000)
    session = StreamingSession(model, 1, [20, 0], apply_mask=apply_mask, fast='off')
    session.step(samples[:, :9999])
    earlier = [written_by_version_2(session.state_dict()), written_by_version_1(session.state_dict(), 1)]
    torch.manual_seed(1)
    expected = session.step(samples[:, 9999:])
    for state in earlier:
        other = StreamingSession(model, 1, [20, 0], apply_mask=apply_mask, fast='off')
        other.load_state_dict(state)
        targeted = other._way._targeted
        assert (targeted[0].count > 0) if apply_mask else targeted == [None]
        torch.manual_seed(1)
        output = other.step(samples[:, 9999:])
        assert output.current_frame == expected.current_frame and output.lengths == expected.lengths
        if state.get('version') == 2 or not apply_mask:  # version 1 did not remember what was masked
            assert torch.equal(output.encoded, expected.encoded)
            assert output.masked_frames == expected.masked_frames
            assert not apply_mask or torch.equal(output.loss, expected.loss)
