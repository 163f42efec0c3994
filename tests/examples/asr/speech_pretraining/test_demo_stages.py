# SPDX-License-Identifier: Apache-2.0
import os

import pytest


@pytest.fixture(scope='module')
def stages(load_example):
    return load_example('demo_stages')


def test_the_model_saved_last_is_put_in_place_when_the_training_is_done(stages, tmp_path, monkeypatch):
    model_file = tmp_path / 'model.nemo'

    def script(name, *arguments):
        assert not model_file.exists() and arguments[:2] == ('--config-name', 'tiny')
        assert arguments[2:] == (f"+exp_manager.explicit_log_dir='{tmp_path}/run'", 'seed=1')
        (tmp_path / 'run/checkpoints').mkdir(parents=True)
        for age, saved in enumerate(('last', 'first')):
            (tmp_path / f'run/checkpoints/{saved}.nemo').write_text(saved)
            os.utime(tmp_path / f'run/checkpoints/{saved}.nemo', (1000 - age, 1000 - age))

    monkeypatch.setattr(stages, 'run', script)
    stages.train('script.py', 'tiny', ['seed=1'], tmp_path / 'run', model_file)
    assert model_file.read_text() == 'last'


def test_a_training_that_leaves_no_model_is_an_error(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, 'run', lambda *arguments: None)
    with pytest.raises(SystemExit, match='left no .nemo file in .*run/checkpoints'):
        stages.train('script.py', 'tiny', [], tmp_path / 'run', tmp_path / 'model.nemo')
    assert not (tmp_path / 'model.nemo').exists()


def test_a_script_that_fails_ends_the_demo_with_its_status(stages, tmp_path, monkeypatch):
    (tmp_path / 'fails.py').write_text('raise SystemExit(7)')
    monkeypatch.setattr(stages, 'HERE', tmp_path)
    with pytest.raises(SystemExit) as ended:
        stages.run('fails.py')
    assert ended.value.code == 7
