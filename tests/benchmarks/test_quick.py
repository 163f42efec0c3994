# SPDX-License-Identifier: Apache-2.0
"""Each benchmark runs with --quick. What it starts as processes runs here, or where NeMo is imported already."""

import subprocess
import threading
from pathlib import Path

import pytest
from fresh_process import run_python
from load_script import load_script

FOLDER = Path(__file__).resolve().parents[2] / 'benchmarks'
# The benchmarks that need speech, and the options that take it.
SPEECH = {
    'long_form_training': ['--manifest={train}'],
    'objectives': ['--train', '{train}', '--validation', '{validation}'],
}
WRITE = {
    'data_loading': '--output={folder}',
    'long_form_training': '--output={folder}',
    'mask_windows': '--output={folder}/picture.png',
    'objectives': '--output={folder}',
    'training_step': '--output={folder}',
}
NEEDS_A_RECOGNISER = ('nemo_pipelines',)
NO_BENCHMARKS = ('measure', *(path.stem for path in FOLDER.glob('*_cases.py')))
NAMES = sorted({path.stem for path in FOLDER.glob('*.py')} - {*NO_BENCHMARKS, *NEEDS_A_RECOGNISER})


class CaseHere:
    """A ``CaseProcess`` without the process: it builds the case in this one, stock or not."""

    def __init__(self, script, case, stock, environment=None, python=None):
        self._module, self._stock = load_script(script), stock
        self._run = self._module.build({**case, 'stock': False})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, at_least=0.0):
        from measure import timed

        return timed(self._run, 0.0)

    def peak(self):
        self._run()
        return 1.0

    def about(self):
        return {**self._module.about(self._run), 'patched': not self._stock}


class ForkedPopen:
    """A process of a script where NeMo is imported already."""

    def __init__(self, command, env, **settings):
        self._thread = threading.Thread(target=self._work, args=(command, env))
        self._thread.start()

    def _work(self, command, env):
        self._done = run_python(*command[1:], **env)

    def communicate(self):
        self._thread.join()
        self.returncode = self._done.returncode
        return self._done.stdout, self._done.stderr


def forked(command, env=None, check=False, **settings):
    patched = (env or {}).get('NEMO_STREAMING_SSL') != '0'
    variables = {name: value for name, value in (env or {}).items() if name != 'NEMO_STREAMING_SSL'}
    done = run_python(*command[1:], patched=patched, **variables)
    assert done.returncode == 0 or not check, done.stderr[-2000:]
    return done


@pytest.mark.integration
@pytest.mark.parametrize('name', NAMES)
def test_it_runs(name, tmp_path, monkeypatch, capsys, request):
    monkeypatch.syspath_prepend(FOLDER)
    script = load_script(FOLDER / f'{name}.py')
    monkeypatch.setattr(subprocess, 'run', forked)
    monkeypatch.setattr(subprocess, 'Popen', ForkedPopen)
    if hasattr(script, 'CaseProcess'):
        monkeypatch.setattr(script, 'CaseProcess', CaseHere)
    options = ['--quick', *([WRITE[name]] if name in WRITE else []), *SPEECH.get(name, [])]
    places = {'folder': tmp_path}
    if name in SPEECH:
        corpus = request.getfixturevalue('speech_corpus')
        places |= {'train': corpus / 'train_manifest.json', 'validation': corpus / 'validation_manifest.json'}
    script.main([option.format(**places) for option in options])
    assert capsys.readouterr().out
