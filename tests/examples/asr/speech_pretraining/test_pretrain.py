# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import run_python
from omegaconf import open_dict
from tiny_nest import SMALL, tiny_config

SCRIPT = Path(__file__).resolve().parents[4] / 'examples/asr/speech_pretraining/pretrain.py'


def run_script(folder, corpus, *overrides, **environment):
    """Run the training script on a corpus, with its experiment in a folder."""
    small = [override for override in SMALL if not override.endswith('=null')]
    arguments = ['--config-name', 'nest_hierarchical_streaming_tiny', *small]
    arguments += [
        f'model.train_ds.manifest_filepath={corpus}/train_manifest.json',
        f'model.train_ds.noise_manifest={corpus}/noise_manifest.json',
        f'model.validation_ds.manifest_filepath={corpus}/validation_manifest.json',
        'model.encoder.layer_att_context_size=null',
        '~curriculum',
        'seed=1',
        'trainer.log_every_n_steps=1',
        f'+exp_manager.explicit_log_dir={folder}/run',
        *overrides,
    ]
    if environment:  # nothing of NeMo may be there yet
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=folder)
    return run_python(SCRIPT, *arguments, cwd=folder)


@pytest.mark.integration
def test_trains_saves_and_goes_on_where_it_was(tmp_path, speech_corpus):
    from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

    hierarchical = ['model.encoder.n_layers=2', 'model.encoder.layer_att_context_size=[[0,[10,0]],[1,[20,0]]]']
    hierarchical += ['+curriculum.milestones=[[0,[10,0]],[2,[40,0]]]']
    first = run_script(tmp_path, speech_corpus, *hierarchical, 'trainer.max_steps=3', 'trainer.val_check_interval=1')
    assert first.returncode == 0, first.stderr[-3000:]
    log = first.stdout + first.stderr
    assert 'nemo.collections.asr.models.ssl_models' in log and 'active: yes' in log
    assert 'receptive field' in log.lower()
    model = EncDecDenoiseMaskedTokenPredModel.restore_from(
        str(next((tmp_path / 'run/checkpoints').glob('*.nemo'))), map_location='cpu'
    )
    assert [layer.self_attention.att_context_size for layer in model.encoder.layers] == [[10, 0], [20, 0]]

    second = run_script(tmp_path, speech_corpus, *hierarchical, 'trainer.max_steps=5', 'trainer.val_check_interval=1')
    assert second.returncode == 0, second.stderr[-3000:]
    assert 'Restored all states from the checkpoint' in second.stdout + second.stderr
    assert '`max_steps=5` reached' in second.stdout + second.stderr


@pytest.mark.integration
def test_refuses_to_run_unpatched(tmp_path, speech_corpus):
    done = run_script(tmp_path, speech_corpus, NEMO_STREAMING_SSL='0')
    assert done.returncode != 0
    assert 'needs the patches of nemo-streaming-ssl' in done.stderr and 'NEMO_STREAMING_SSL' in done.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.integration
def test_a_bad_config_ends_in_one_clear_error_before_anything_is_written(tmp_path, speech_corpus):
    done = run_script(tmp_path, speech_corpus, '+model.encoder.att_contxt_size=[10,0]')
    assert done.returncode != 0
    assert 'model.encoder.att_contxt_size is not an argument of ConformerEncoder' in done.stderr
    assert 'did you mean att_context_size?' in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'run').exists()


@pytest.fixture
def script(load_example):
    return load_example('pretrain')


def config_for(corpus, **changes):
    cfg = tiny_config(name='nest_hierarchical_streaming_tiny')
    with open_dict(cfg):
        train = {'manifest_filepath': f'{corpus}/train_manifest.json', 'min_duration': 0.05, 'max_duration': 16.0}
        cfg.model.train_ds = {**train, **changes}
        cfg.model.validation_ds = {'manifest_filepath': f'{corpus}/validation_manifest.json'}
    return cfg


def test_prepare_takes_a_statistics_file(script, tmp_path, speech_corpus):
    statistics = {'fixed_mean': [0.5] * 80, 'fixed_std': [2.0] * 80}
    (tmp_path / 'stats.yaml').write_text('\n'.join(f'{name}: {value}' for name, value in statistics.items()))
    cfg = config_for(speech_corpus)
    cfg.model.preprocessor.normalize = str(tmp_path / 'stats.yaml')
    assert script.prepare(cfg).model.preprocessor.normalize == statistics
    cfg.model.preprocessor.normalize = str(tmp_path / 'none.yaml')
    with pytest.raises((ValueError, OSError), match='none.yaml'):
        script.prepare(cfg)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'manifest_filepath': 'nowhere.json'}, 'model.train_ds.manifest_filepath: no file nowhere.json'),
        ({'max_duration': 0.1}, 'none of the .* entries'),
        ({'noise_manifest': 'nowhere.json'}, 'model.train_ds.noise_manifest: no file nowhere.json'),
    ],
)
def test_prepare_refuses_bad_manifests(script, speech_corpus, changes, message):
    with pytest.raises(ValueError, match=message):
        script.prepare(config_for(speech_corpus, **changes))


@pytest.mark.parametrize(
    'contexts, message',
    [
        ([[10, 0], [20]], r'att_context_size\[1\]'),
        ([[10, 0], [-3, 0]], r'att_context_size\[1\].*-3'),
        ([['far', 0]], r"att_context_size\[0\].*'far'"),
    ],
)
def test_prepare_refuses_bad_contexts(script, speech_corpus, contexts, message):
    cfg = config_for(speech_corpus)
    cfg.model.encoder.att_context_size = contexts
    with pytest.raises(ValueError, match=message):
        script.prepare(cfg)
