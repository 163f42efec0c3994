# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from fresh_process import run_python
from omegaconf import OmegaConf, open_dict
from tiny_nest import SMALL, tiny_config

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

SCRIPT = Path(__file__).resolve().parents[4] / 'examples/asr/speech_pretraining/pretrain.py'


def run_script(folder, corpus, *overrides):
    """Run the training script on a corpus, with its experiment in a folder; returns its status and all that it says."""
    arguments = [override for override in SMALL if not override.endswith('=null')]
    arguments += [
        f'model.train_ds.manifest_filepath={corpus}/train_manifest.json',
        f'model.train_ds.noise_manifest={corpus}/noise_manifest.json',
        f'model.validation_ds.manifest_filepath={corpus}/validation_manifest.json',
        'seed=1',
        'trainer.val_check_interval=1',
        f'+exp_manager.explicit_log_dir={folder}/run',
        *overrides,
    ]
    done = run_python(SCRIPT, '--config-name', 'nest_hierarchical_streaming_tiny', *arguments, cwd=folder)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.integration
def test_trains_saves_and_goes_on_where_it_was(tmp_path, speech_corpus):
    hierarchical = ['model.encoder.n_layers=2', 'model.encoder.layer_att_context_size=[[0,[10,0]],[1,[20,0]]]']
    hierarchical += ['curriculum.milestones=[[0,[10,0]],[2,[40,0]]]']
    status, log = run_script(tmp_path, speech_corpus, *hierarchical, 'trainer.max_steps=3')
    assert status == 0, log[-3000:]
    assert 'active: yes' in log and 'receptive field' in log.lower()
    (saved,) = (tmp_path / 'run/checkpoints').glob('*.nemo')
    model = EncDecDenoiseMaskedTokenPredModel.restore_from(str(saved), map_location='cpu')
    assert [layer.self_attention.att_context_size for layer in model.encoder.layers] == [[10, 0], [20, 0]]
    status, log = run_script(tmp_path, speech_corpus, *hierarchical, 'trainer.max_steps=5')
    assert status == 0, log[-3000:]
    assert 'Restored all states from the checkpoint' in log and '`max_steps=5` reached' in log


@pytest.mark.integration
def test_a_bad_config_ends_in_one_error_before_anything_is_written(tmp_path, speech_corpus):
    status, log = run_script(tmp_path, speech_corpus, '+model.encoder.att_contxt_size=[10,0]')
    assert status == 2 and 'pretrain: error: model.encoder.att_contxt_size' in log and 'Traceback' not in log
    assert not (tmp_path / 'run').exists()


@pytest.fixture
def prepare(load_example, speech_corpus):
    """Return a function that prepares a config with one value changed."""

    def prepared(key, value):
        cfg = tiny_config(name='nest_hierarchical_streaming_tiny')
        with open_dict(cfg):
            train, validation = (f'{speech_corpus}/{name}_manifest.json' for name in ('train', 'validation'))
            cfg.model.train_ds = {'manifest_filepath': train, 'min_duration': 0.05, 'max_duration': 16.0}
            cfg.model.validation_ds = {'manifest_filepath': validation}
            OmegaConf.update(cfg.model, key, value)
        return load_example('pretrain').prepare(cfg)

    return prepared


def test_prepare_takes_a_statistics_file(prepare, tmp_path):
    statistics = {'fixed_mean': [0.5] * 80, 'fixed_std': [2.0] * 80}
    OmegaConf.save(statistics, tmp_path / 'stats.yaml')
    assert prepare('preprocessor.normalize', str(tmp_path / 'stats.yaml')).model.preprocessor.normalize == statistics


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('preprocessor.normalize', 'none.yaml', 'none.yaml'),
        ('train_ds.manifest_filepath', 'nowhere.json', 'model.train_ds.manifest_filepath: no file nowhere.json'),
        ('train_ds.max_duration', 0.1, 'none of the .* entries'),
        ('train_ds.noise_manifest', 'nowhere.json', 'model.train_ds.noise_manifest: no file nowhere.json'),
        ('encoder.att_context_size', [[10, 0], [20]], r'att_context_size\[1\]'),
        ('encoder.att_context_size', [[10, 0], [-3, 0]], r'att_context_size\[1\].*-3'),
        ('encoder.att_context_size', [['far', 0]], r"att_context_size\[0\].*'far'"),
    ],
)
def test_prepare_refuses_what_cannot_work(prepare, key, value, message):
    with pytest.raises((ValueError, OSError), match=message):
        prepare(key, value)
