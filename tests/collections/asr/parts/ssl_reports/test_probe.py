# SPDX-License-Identifier: Apache-2.0
"""Frozen probe: layer outputs, the weighted sum, CTC paths and error counts, compared with computations by hand."""

import math

import pytest
import torch
from tiny_nest import tiny_model

from nemo.collections.asr.parts.ssl_reports.probe import (
    LayerProbe,
    ProbeSettings,
    count_errors,
    fit_probe,
    layer_outputs,
    probe_errors,
    transcribe,
)

TWO = ('model.encoder.n_layers=2', 'model.encoder.att_context_size=[[2,0],[-1,0]]')


def test_layer_outputs_are_those_of_each_layer_in_the_context():
    encoder = tiny_model(*TWO, seed=1).encoder.train()
    features, lengths = torch.randn(2, 80, 96), torch.tensor([96, 40])
    found = layer_outputs(encoder, [(features, lengths)], [2, 0])
    assert encoder.training and not encoder.layers[0]._forward_hooks
    encoder.eval()
    with encoder.using_att_context_size([2, 0]), torch.no_grad():
        last, encoded_lengths = encoder(audio_signal=features, length=lengths)
    assert [tuple(rows.shape) for rows in found] == [(int(length), 2, 16) for length in encoded_lengths]
    torch.testing.assert_close(found[1][:, 1].float(), last[1, :, : len(found[1])].t(), atol=2e-3, rtol=1e-2)
    other = layer_outputs(encoder, [(features, lengths)], [-1, 0])
    assert not torch.allclose(found[0], other[0])


def test_a_probe_mixes_normalised_layers_by_the_softmax_of_their_weights():
    probe = LayerProbe(layers=2, width=4, classes=3, hidden=5)
    with torch.no_grad():
        probe.layer_weights.copy_(torch.tensor([math.log(3.0), 0.0]))  # 3/4 and 1/4
    outputs = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 8.0]])
    normalised = (outputs - outputs.mean(1, keepdim=True)) / outputs.std(1, keepdim=True, unbiased=False)
    by_hand = probe.classify(0.75 * normalised[0] + 0.25 * normalised[1]).log_softmax(dim=0)
    torch.testing.assert_close(probe(outputs), by_hand, atol=1e-4, rtol=1e-4)
    assert probe.blank == 3


def test_transcripts_merge_repetitions_and_drop_blanks():
    class Given(torch.nn.Module):
        blank = 2

        def forward(self, rows):
            return torch.nn.functional.one_hot(rows[:, 0, 0].long(), 3).float()

    path = torch.tensor([2, 0, 0, 2, 0, 1, 1, 2])
    assert transcribe(Given(), [path.view(-1, 1, 1).float()]) == [[0, 0, 1]]


@pytest.mark.parametrize(
    ('heard', 'said', 'errors'),
    [([1, 2, 3], [1, 2, 3], 0), ([], [5, 6], 2), ([1, 3], [1, 2, 3], 1), ([1, 4, 3, 9], [1, 2, 3], 2), ([7], [], 1)],
)
def test_errors_are_edit_distances(heard, said, errors):
    assert count_errors([heard], [said]) == [errors]
    assert count_errors([], []) == []


def test_a_probe_learns_what_the_outputs_hold_and_leaves_the_random_generator_alone():
    generator = torch.Generator().manual_seed(0)
    codes = torch.eye(4).view(4, 1, 4) * 5  # a frame of one layer shows its label

    def utterances(number):
        labels = [torch.randint(3, (4,), generator=generator).tolist() for _ in range(number)]
        spread = [torch.stack([codes[code] for label in row for code in (label, 3)]) for row in labels]
        return spread, labels

    (train, train_labels), (test, test_labels) = utterances(40), utterances(10)
    parts, labels = {'train': train, 'test': test}, {'train': train_labels, 'test': test_labels}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    settings = ProbeSettings(steps=150, batch_size=8, hidden=16, learning_rate=1e-2, warmup_steps=5)
    errors, probe = probe_errors(parts.__getitem__, labels, 3, settings)
    assert sum(errors) == 0 and torch.equal(before, torch.get_rng_state())
    again = fit_probe(train, train_labels, 3, settings)
    assert torch.equal(again.layer_weights, probe.layer_weights)
