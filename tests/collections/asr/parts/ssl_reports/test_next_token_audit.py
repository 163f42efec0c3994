# SPDX-License-Identifier: Apache-2.0
"""Which share of the frames is asked for a token at each horizon."""

import pytest
import torch
from tiny_nest import noise_batch, tiny_model

from nemo.collections.asr.parts.ssl_reports.next_token_audit import counted_shares


@pytest.mark.parametrize('look_ahead', [0, 2])
def test_shares_are_those_of_the_loss(look_ahead):
    model = tiny_model('+model.objective=next_token', f'model.encoder.att_context_size=[4,{look_ahead}]').eval()
    with torch.no_grad():
        record = model.encode_batch(noise_batch((2.0, 0.5)), None)
    targets = model.next_token_frames(record).targets[..., 0]
    frames = int(record.encoded_lengths.sum())
    shares = counted_shares(record, horizons=4)
    assert list(shares) == [f'audit/counted_share/next_{horizon}' for horizon in range(4)]
    for horizon, share in enumerate(shares.values()):
        assert share == pytest.approx(int((targets[:, horizon] >= 0).sum()) / frames)


def test_an_utterance_that_ends_before_the_first_next_token_is_asked_for_none():
    model = tiny_model('+model.objective=next_token', 'model.encoder.att_context_size=[4,20]').eval()
    with torch.no_grad():
        record = model.encode_batch(noise_batch((0.5,)), None)
    assert set(map(float, counted_shares(record, horizons=2).values())) == {0.0}
