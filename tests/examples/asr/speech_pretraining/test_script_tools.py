# SPDX-License-Identifier: Apache-2.0
"""What the scripts share, and what holds for all of them: each checks the patches, and none imports another."""

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

FOLDER = Path(__file__).resolve().parents[4] / 'examples/asr/speech_pretraining'
TREES = {path.stem: ast.parse(path.read_text(encoding='utf-8')) for path in sorted(FOLDER.glob('*.py'))}
TOOLS = [
    'corpus_sentences',
    'script_tools',
]
SCRIPTS = [name for name in TREES if name not in TOOLS]
GUARD = 'require_patches'
RATE = 16000

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


def imports_of(nodes):
    """Return the names of the modules that some nodes import, each with its line."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            found[node.module] = node.lineno
        elif isinstance(node, ast.Import):
            found.update({alias.name: node.lineno for alias in node.names})
    return found


def lines_of_nemo(tree):
    """Return the lines where importing a file imports NeMo."""
    return [line for name, line in imports_of(tree.body).items() if name.split('.')[0] == 'nemo']


def calls_of(node):
    """Return the names of the functions that a piece of code calls by their bare name."""
    calls = (item.func for item in ast.walk(node) if isinstance(item, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


def functions_of(tree):
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def calls_before_the_guard(statements):
    """Return the functions that run before the guard does; None if it is not among the statements themselves."""
    seen = set()
    for statement in statements:
        if isinstance(statement, (ast.Expr, ast.Assign)) and GUARD in calls_of(statement):
            return seen
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            seen |= calls_of(statement)
    return None


def top_level(tree):
    """Return the statements of a file up to the last one before its first import of NeMo."""
    first = min(lines_of_nemo(tree))
    return [statement for statement in tree.body if statement.lineno < first]


def unguarded(tree):
    """Return what a script does before it checks the patches, or that it never does; empty if all is well.

    A script that imports NeMo at its top calls the guard above that, so its ``main`` cannot be reached without.
    Others call it in ``main`` itself, once the command line is parsed.
    """
    if lines_of_nemo(tree):
        before, allowed = calls_before_the_guard(top_level(tree)), set()
    else:
        before, allowed = calls_before_the_guard(functions_of(tree)['main'].body), {'arguments'}
    return {'everything'} if before is None else (before & set(functions_of(tree))) - allowed


def test_a_file_is_a_script_or_a_tool():
    assert [name for name, tree in TREES.items() if 'main' not in functions_of(tree)] == TOOLS
    assert sorted(COMMANDS) == SCRIPTS


@pytest.mark.parametrize('name', TREES)
def test_no_script_is_imported(name):
    assert not set(imports_of(ast.walk(TREES[name]))) & set(SCRIPTS)


@pytest.mark.parametrize('name', TOOLS)
def test_tools_leave_nemo_to_be_imported_after_the_check(name):
    assert not lines_of_nemo(TREES[name])


@pytest.mark.parametrize('name', SCRIPTS)
def test_each_script_checks_the_patches_before_its_work(name):
    assert not unguarded(TREES[name])


@pytest.mark.parametrize(
    ('code', 'found'),
    [
        ('def main(): require_patches(__file__); work()\ndef work(): pass', set()),
        ('def main(): options = arguments(); require_patches(__file__)\ndef arguments(): pass', set()),
        ('require_patches(__file__)\nimport nemo.core\ndef main(): pass', set()),
        ('def main(): work(); require_patches(__file__)\ndef work(): pass', {'work'}),
        ('def main(): pass', {'everything'}),
        ('def main():\n    if 1: require_patches(__file__)', {'everything'}),
        ('from nemo.core import x\nrequire_patches(__file__)\ndef main(): pass', {'everything'}),
        ('import nemo\ndef main(): require_patches(__file__)', {'everything'}),
    ],
)
def test_a_missing_or_late_check_is_found(code, found):
    assert unguarded(ast.parse(code)) == found


@pytest.mark.integration
@pytest.mark.parametrize('name', SCRIPTS)
def test_each_script_refuses_stock_nemo_in_one_line(name, tmp_path):
    command = [sys.executable, str(FOLDER / f'{name}.py'), *COMMANDS[name]]
    environment = {**os.environ, 'NEMO_STREAMING_SSL': '0'}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1 and not done.stdout and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'{name} needs the patches of nemo-streaming-ssl: ') and 'NEMO_STREAMING_SSL=0' in line


@pytest.mark.integration
@pytest.mark.parametrize('name', SCRIPTS)
def test_each_script_has_help_with_an_example(name, tmp_path):
    command = [sys.executable, str(FOLDER / f'{name}.py'), '--help']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
    summary, *_ = ast.get_docstring(TREES[name]).splitlines()
    assert summary in done.stdout
    example, *_ = [line for line in done.stdout.splitlines() if line.lstrip().startswith(f'python {name}.py')]
    options = [word for word in example.split() if word.startswith('--')]
    assert all(option.strip('[]').split('=')[0] in done.stdout.split(example)[1] for option in options[:2])


def test_help_is_shown_before_anything_is_imported(tools, monkeypatch, capsys):
    tools.show_help('What it does.')  # nobody asked
    monkeypatch.setattr(sys, 'argv', ['script.py', 'a=1', '--help'])
    with pytest.raises(SystemExit) as ended:
        tools.show_help('What it does.\n\n    python script.py\n')
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith('What it does.\n\n    python script.py\n\nEvery key of the config')


def test_an_error_about_a_key_leads_to_its_page(tools, capsys):
    tools.report_error('script.py', ValueError('curriculum.milestones is 3; it must be pairs'), status=1)
    said = capsys.readouterr().err.splitlines()
    assert said[1] == 'See docs/contexts.md#curriculum (python -m nemo_streaming_ssl docs contexts)'
    assert tools.explained(ValueError('x is 3')) == 'x is 3'
    twice = tools.explained(ValueError(tools.explained(ValueError('encoder.blockwise_attention is 3'))))
    assert twice.count('See docs/blockwise.md') == 1


def test_the_report_on_the_patches_comes_back_for_the_log(tools):
    lines = tools.require_patches('some/script.py', 'nemo.collections.asr.models.ssl_models')
    assert any('active: yes' in line for line in lines)


@pytest.mark.parametrize('error', [RuntimeError('stock is in use'), ImportError('stock is in use')])
def test_inactive_patches_end_the_script(tools, monkeypatch, error):
    def refuse(*names):
        raise error

    monkeypatch.setattr('nemo_streaming_ssl.report.require_active', refuse)
    with pytest.raises(SystemExit, match='^script needs the patches of nemo-streaming-ssl: stock is in use$'):
        tools.require_patches('some/script.py')


def test_an_error_is_one_line_with_the_scripts_name(tools, capsys):
    assert tools.report_error('some/script.py', ValueError('x is 3'), status=2) == 2
    assert capsys.readouterr().err == 'script: error: x is 3\n'


def test_files_need_a_folder(tools, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    tools.check_folders(parser, argparse.Namespace(json=tmp_path / 'x.json', csv=None), 'json', 'csv')
    with pytest.raises(SystemExit) as ended:
        tools.check_folders(parser, argparse.Namespace(json=None, csv=tmp_path / 'none/x.csv'), 'json', 'csv')
    assert ended.value.code == 2
    assert f"--csv {tmp_path / 'none/x.csv'}: there is no folder {tmp_path / 'none'}" in capsys.readouterr().err


def test_a_text_that_cannot_be_written_leaves_the_old_one(tools, tmp_path):
    path = tmp_path / 'file.txt'
    tools.write_text(path, 'old: äöü\n')
    with pytest.raises(UnicodeEncodeError):
        tools.write_text(path, 'new: \ud800')
    assert path.read_text(encoding='utf-8') == 'old: äöü\n' and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match='could not write .*none/file.txt'):
        tools.write_text(tmp_path / 'none/file.txt', 'new')


@pytest.mark.parametrize(
    ('name', 'reason'), [('missing.nemo', 'there is no such file'), ('text.wav', 'NeMo cannot restore it')]
)
def test_files_that_are_no_model_are_named(tools, audio_folder, name, reason):
    with pytest.raises(ValueError, match=f'--model {audio_folder / name}: {reason}'):
        tools.restore(audio_folder / name, 'cpu')


class Trainer:
    """Keeps what it is told to fit."""

    def __init__(self):
        self.fitted = []

    def fit(self, model):
        self.fitted.append(model)


def test_what_was_prepared_is_built_and_fitted(tools):
    trainer = Trainer()
    cfg = OmegaConf.create({'size': 2})
    tools.fit_or_exit(
        'some/script.py', [], cfg, lambda cfg: {'size': cfg.size + 1}, lambda cfg: (trainer, f"model of {cfg['size']}")
    )
    assert trainer.fitted == ['model of 3']


@pytest.mark.parametrize('error', [ValueError('size is 2'), OSError('size is 2'), InstantiationException('size is 2')])
@pytest.mark.parametrize('place', ['prepare', 'build'])
def test_what_cannot_be_built_ends_in_one_message_before_training(tools, error, place, capsys):
    def fail(cfg):
        raise error

    steps = {'prepare': lambda cfg: cfg, 'build': lambda cfg: (Trainer(), None), place: fail}
    with pytest.raises(SystemExit) as end:
        tools.fit_or_exit('some/script.py', ['active: yes'], OmegaConf.create({'size': 2}), **steps)
    assert end.value.code == 2 and capsys.readouterr().err == 'script: error: size is 2\n'


def test_errors_of_training_itself_keep_their_traceback(tools):
    class Broken(Trainer):
        def fit(self, model):
            raise ValueError('in step 7')

    with pytest.raises(ValueError, match='in step 7'):
        tools.fit_or_exit('script.py', [], OmegaConf.create({}), lambda cfg: cfg, lambda cfg: (Broken(), None))


def test_contexts_on_the_command_line(tools):
    assert [tools.context_option(text) for text in ('[40,0]', '40', 'low')] == [[40, 0], 40, 'low']
