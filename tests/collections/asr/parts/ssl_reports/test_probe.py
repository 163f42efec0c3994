# SPDX-License-Identifier: Apache-2.0
"""Frozen probe: layer outputs, the weighted sum, CTC paths and error counts, compared with computations by hand."""

import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from tiny_nest import batches, tiny_model, trainer

from nemo.collections.asr.parts.ssl_reports import probe as probe_module
from nemo.collections.asr.parts.ssl_reports.probe import (
    LayerProbe,
    ProbeSettings,
    ValidationProbe,
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


@pytest.fixture
def manifests(tmp_path):
    """Manifests of noise: two utterances to fit on, one to test with a character that the others lack."""
    for name, texts in {'train': ('ab', 'b a'), 'test': ('abc',)}.items():
        lines = []
        for index, text in enumerate(texts):
            soundfile.write(tmp_path / f'{name}{index}.wav', np.random.default_rng(index).normal(0, 0.1, 16000), 16000)
            lines.append({'audio_filepath': f'{name}{index}.wav', 'duration': 1.0, 'text': text})
        (tmp_path / f'{name}.json').write_text('\n'.join(map(json.dumps, lines)))
    return {f'{name}_manifest': str(tmp_path / f'{name}.json') for name in ('train', 'test')}


def fit(model, max_steps):
    """Train on one batch an epoch, with a validation after each."""
    run = trainer(max_steps)
    model.set_trainer(run)
    run.fit(model, batches(1), batches(1))
    return run


def probing_model(manifests, *overrides):
    section = ', '.join(f"{key}: '{path}'" for key, path in manifests.items())
    contexts = 'model.encoder.att_context_size=[[4,0],[-1,0]]'
    return tiny_model(contexts, f'+model.probe={{{section}, steps: 2, every_n_validations: 2}}', *overrides)


def test_every_second_validation_logs_the_error_rate_of_each_context(manifests):
    model = probing_model(manifests)
    with mock.patch.object(probe_module, 'probe_errors', return_value=([2], None)) as probed:
        run = fit(model, max_steps=4)
    assert probed.call_count == 2 * 2  # the second and the fourth validation, two contexts each
    for label in ('ctx_4_0', 'ctx_unlimited_0'):
        assert run.logger.column(f'probe/error_rate/{label}') == pytest.approx([2 / 3] * 2)
    assert len(run.logger.column('probe/seconds')) == 2


def test_training_is_the_same_with_and_without_a_probe(manifests):
    losses = []
    for model in (probing_model(manifests), tiny_model('model.encoder.att_context_size=[[4,0],[-1,0]]')):
        torch.manual_seed(0)
        run = fit(model, max_steps=3)
        losses.append(run.logger.column('train_loss'))
        assert [0 < rate for rate in run.logger.column('probe/error_rate/ctx_4_0')] == [True] * (len(losses) == 1)
    assert losses[0] == losses[1]


def test_a_validation_alone_probes_and_a_test_needs_none_of_its_data(manifests):
    model, run = probing_model(manifests, 'model.probe.every_n_validations=1'), trainer(1)
    model.set_trainer(run)
    run.validate(model, batches(1), verbose=False)  # in inference mode
    assert run.callback_metrics['probe/error_rate/ctx_4_0'] > 0
    for path in manifests.values():
        Path(path).unlink()
    run.test(model, batches(1), verbose=False)


def test_characters_of_the_test_alone_count_as_errors(manifests):
    probe = ValidationProbe(manifests)
    assert probe.classes == 3 and probe.labels == {'train': [[1, 2], [2, 0, 1]], 'test': [[1, 2, 4]]}


def test_segments_of_a_file_and_a_tilde(manifests, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    segments = [
        {'audio_filepath': 'train0.wav', 'offset': start, 'duration': 0.25, 'text': 'a'} for start in (0.0, 0.5)
    ]
    (tmp_path / 'train.json').write_text('\n'.join(map(json.dumps, segments)))
    probe = ValidationProbe({name: f'~/{name.partition("_")[0]}.json' for name in manifests})
    [(features, lengths)] = probe._batches(tiny_model(), 'train')
    assert lengths.tolist() == [25, 25] and not torch.equal(features[0], features[1])


@pytest.mark.parametrize(
    'entry, message',
    [
        ({'text': 'a'}, 'line 1 has no audio_filepath'),
        ({'audio_filepath': 'gone.wav', 'text': 'a'}, 'no audio file gone.wav'),
    ],
)
def test_an_utterance_without_audio_is_named_before_training(manifests, tmp_path, entry, message):
    (tmp_path / 'test.json').write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=f'model.probe.test_manifest is .*{message}'):
        ValidationProbe(manifests)
