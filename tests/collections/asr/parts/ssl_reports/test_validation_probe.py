# SPDX-License-Identifier: Apache-2.0
"""model.probe: a probe after every n validations, its error rate per context in the log."""

import json
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from tiny_nest import batches, tiny_model, trainer

from nemo.collections.asr.parts.ssl_reports import validation_probe
from nemo.collections.asr.parts.ssl_reports.validation_probe import ValidationProbe


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
    with mock.patch.object(validation_probe, 'probe_errors', return_value=([2], None)) as probed:
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
