# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fresh_process import run_python
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

FOLDER = Path(__file__).resolve().parents[4] / 'examples/asr/speech_pretraining'

# For each script a command line that its parser accepts; the training scripts take theirs from a config.
COMMANDS = {
    'compute_feature_stats': ['--manifest', 'train.json', '--output', 'made'],
    'convert_to_streaming': ['--model', 'offline.nemo', '--output', 'made'],
    'evaluate_contexts': ['--model', 'model.nemo', '--manifest', __file__],
    'evaluate_streaming': ['--model', 'model.nemo', 'speech.wav'],
    'finetune_streaming': [],
    'hierarchical_streaming_nest': [],
    'make_speech_corpus': ['--output', 'made'],
    'plot_contexts': ['--logs', 'run', '--output', 'made'],
    'prepare_shards': ['--manifest', 'train.json', '--output', 'made'],
    'pretrain': [],
    'pretrain_demo': ['--output', 'made'],
    'streaming_inference_example': ['--model', 'model.nemo', 'speech.wav'],
}


@pytest.fixture(scope='module')
def tools(load_example):
    return load_example('script_tools')


def test_each_script_has_a_command_here():
    assert set(COMMANDS) == {path.stem for path in FOLDER.glob('*.py')} - {'corpus_sentences', 'script_tools'}


@pytest.mark.integration
@pytest.mark.parametrize('name', COMMANDS)
def test_each_script_refuses_stock_nemo_in_one_line(name, tmp_path):
    done = run_python(FOLDER / f'{name}.py', *COMMANDS[name], patched=False, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'{name} needs the patches of nemo-streaming-ssl: ') and 'NEMO_STREAMING_SSL=0' in line


def test_help_is_shown_before_anything_is_imported(tools, monkeypatch, capsys):
    tools.show_help('What it does.')  # nobody asked
    monkeypatch.setattr(sys, 'argv', ['script.py', 'a=1', '--help'])
    with pytest.raises(SystemExit, match='0'):
        tools.show_help('What it does.\n\n    python script.py\n')
    assert capsys.readouterr().out.startswith('What it does.\n\n    python script.py\n')


def test_an_error_about_a_key_leads_to_its_page(tools, capsys):
    assert tools.report_error('some/script.py', ValueError('curriculum.milestones is 3')) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == 'script: error: curriculum.milestones is 3' and 'docs/contexts.md#curriculum' in second
    tools.report_error('some/script.py', ValueError('x is 3'))
    assert capsys.readouterr().err == 'script: error: x is 3\n'


@pytest.mark.parametrize('name', ['missing.nemo', 'text.wav'])
def test_a_file_that_is_no_model_is_named(tools, audio_folder, name):
    with pytest.raises(ValueError, match=f'--model {audio_folder / name}'):
        tools.restore(audio_folder / name, 'cpu')


def fit(tools, fit, cfg=None, prepare=lambda cfg: cfg, build=None):
    """Call ``fit_or_exit`` with steps of a training script; the trainer only calls ``fit``."""
    build = build or (lambda cfg: (SimpleNamespace(fit=fit), cfg))
    tools.fit_or_exit('some/script.py', [], OmegaConf.create(cfg or {}), prepare, build)


@pytest.mark.parametrize('error', [ValueError('size is 2'), OSError('size is 2'), InstantiationException('size is 2')])
@pytest.mark.parametrize('step', ['prepare', 'build'])
def test_what_cannot_be_built_ends_in_one_message_before_training(tools, error, step, capsys):
    def fail(cfg):
        raise error

    with pytest.raises(SystemExit, match='2'):
        fit(tools, None, **{step: fail})
    assert capsys.readouterr().err == 'script: error: size is 2\n'


def test_errors_of_training_itself_keep_their_traceback(tools):
    def broken(model):
        raise ValueError('in step 7')

    with pytest.raises(ValueError, match='in step 7'):
        fit(tools, broken)
