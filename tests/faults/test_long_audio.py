# SPDX-License-Identifier: Apache-2.0
"""An hour of audio in one file: left out by ``max_duration``, and without it trained on at linear cost."""

import json
import resource

import numpy as np
import pytest
import soundfile
import torch
from omegaconf import OmegaConf
from tiny_nest import fit, tiny_model
from torch.utils.data import DataLoader

from nemo.collections.asr.data import ssl_dataset
from nemo.collections.asr.models.ssl_models import EncDecMaskedTokenPredModel

HOUR = 3600
SMALL = [
    'model.preprocessor.features=16',
    'model.preprocessor.window_stride=0.02',
    'model.encoder.feat_in=16',
    'model.encoder.subsampling_conv_channels=2',
]


@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
    """A manifest of an hour-long file and a short one."""
    folder = tmp_path_factory.mktemp('long')
    noise = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    with soundfile.SoundFile(folder / 'hour.flac', 'w', 16000, 1) as file:
        for _ in range(HOUR):
            file.write(noise)
    soundfile.write(folder / 'short.wav', np.tile(noise, 2), 16000)
    entries = [{'audio_filepath': 'hour.flac', 'duration': HOUR}, {'audio_filepath': 'short.wav', 'duration': 2.0}]
    (folder / 'manifest.json').write_text('\n'.join(map(json.dumps, entries)))
    return str(folder / 'manifest.json')


def dataset(manifest, **more):
    config = {'manifest_filepath': manifest, 'sample_rate': 16000, 'shuffle': False, **more}
    return ssl_dataset.get_audio_noise_dataset_from_config(OmegaConf.create(config), 0, 1)


def test_max_duration_leaves_it_out(manifest):
    assert len(dataset(manifest)) == 2
    [item] = dataset(manifest, max_duration=16.0)
    assert item.audio.shape == (32000,)


@pytest.mark.integration
def test_without_a_limit_it_trains_within_memory_that_its_length_explains(manifest):
    """NeMo's attention would take 22,500 x 22,500 scores, 2 GB for each head, layer and copy."""
    audio = dataset(manifest)[0].audio
    assert audio.shape == (HOUR * 16000,)
    model = tiny_model('model.encoder.att_context_size=[[40,0]]', *SMALL, cls=EncDecMaskedTokenPredModel)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batch = (audio.unsqueeze(0), torch.tensor([len(audio)]))
    reported = []
    model.reports.of_training_batch = lambda _, record: reported.append(record.tokens.shape[1]) or {}
    run = fit(model, DataLoader([batch], batch_size=None), max_steps=1)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert torch.isfinite(torch.tensor(run.logger.column('train_loss'))).all()
    assert kilobytes < 3e6, f'{kilobytes / 1e6:.1f} GB'
    assert reported[0] >= HOUR * 50 // 8
