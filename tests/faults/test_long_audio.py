# SPDX-License-Identifier: Apache-2.0
"""An hour of audio in one file: left out by ``max_duration``, and without it trained on at linear cost."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus import write_manifest
from fresh_process import run_python
from omegaconf import OmegaConf

from nemo.collections.asr.data import ssl_dataset

HOUR = 3600
SMALL = ['preprocessor.features=16', 'preprocessor.window_stride=0.02', 'encoder.feat_in=16']
SMALL = [f'model.{setting}' for setting in [*SMALL, 'encoder.subsampling_conv_channels=2']]


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
    write_manifest(entries, folder / 'manifest.json')
    return str(folder / 'manifest.json')


def dataset(manifest, **more):
    config = {'manifest_filepath': manifest, 'sample_rate': 16000, 'shuffle': False, **more}
    return ssl_dataset.get_audio_noise_dataset_from_config(OmegaConf.create(config), 0, 1)


def test_max_duration_leaves_it_out(manifest):
    assert len(dataset(manifest)) == 2
    [item] = dataset(manifest, max_duration=16.0)
    assert item.audio.shape == (32000,)


TRAIN = """
import json, resource, sys, torch
from test_long_audio import SMALL, dataset
from tiny_nest import fit, tiny_model
from torch.utils.data import DataLoader
from nemo.collections.asr.models.ssl_models import EncDecMaskedTokenPredModel

audio = dataset(sys.argv[1])[0].audio
model = tiny_model('model.encoder.att_context_size=[[40,0]]', *SMALL, cls=EncDecMaskedTokenPredModel)
tokens = []
model.reports.of_training_batch = lambda _, record: tokens.append(record.tokens.shape[1]) or {}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = fit(model, DataLoader([(audio[None], torch.tensor([len(audio)]))], batch_size=None), max_steps=1)
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([kilobytes, tokens[0], run.logger.column('train_loss')]))
"""


@pytest.mark.integration
def test_without_a_limit_it_trains_within_memory_that_its_length_explains(manifest):
    """NeMo's attention would take 22,500 x 22,500 scores, 2 GB for each head, layer and copy."""
    here = Path(__file__).parent
    done = run_python('-c', TRAIN, manifest, PYTHONPATH=f'{here}:{here.parent}')
    assert done.returncode == 0, done.stderr[-3000:]
    kilobytes, tokens, losses = json.loads(done.stdout.splitlines()[-1])
    assert np.isfinite(losses).all() and tokens >= HOUR * 50 // 8
    assert kilobytes < 3e6, f'{kilobytes / 1e6:.1f} GB'
