# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed or meet a full disk lose no checkpoint, and go on as if nothing had happened."""

import json
import signal
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from shared_results import shared_folder
from tiny_nest import restored_weights as weights

RUNS = Path(__file__).with_name('training_runs.py')
KILLS = [
    'in_training',
    'while_a_checkpoint_is_written',
    'before_the_old_last_checkpoint_is_removed',
    'while_a_nemo_file_is_packed',
]
FAULTS = [*KILLS, 'on_a_full_disk']


@pytest.fixture(scope='module')
def runs(tmp_path_factory, speech_corpus):
    """A folder with a run without a fault (``none``), and for each fault what it left and the run that went on."""
    return shared_folder(tmp_path_factory, 'interrupted_runs', lambda root: make_runs(root, speech_corpus))


def make_runs(root, corpus):
    """Let the runs take turns in one process, so that NeMo is imported once."""
    plans = [plan(root, corpus, 'none')]
    plans += [plan(root, corpus, name, fault=name, copy=str(root / 'left' / name)) for name in FAULTS]
    plans += [plan(root, corpus, name) for name in FAULTS]
    statuses = execute(root, plans)
    assert statuses[0] == 0, log(root / 'none')
    for name, status in zip(FAULTS, statuses[1:]):
        assert status == (-signal.SIGKILL if name in KILLS else 1), log(root / 'left' / name)
    for name, status in zip(FAULTS, statuses[1 + len(FAULTS) :]):
        assert status == 0, log(root / name)


def plan(root, corpus, name, **more):
    return {'folder': str(root / name), 'corpus': str(corpus), **more}


def execute(root, plans):
    (root / 'runs.json').write_text(json.dumps(plans))
    done = run_python(RUNS, root / 'runs.json')
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def log(folder):
    return Path(folder, 'log.txt').read_text()


def losses(folder):
    """Step -> loss; of a step that was repeated, both must be the same."""
    record = {}
    for line in Path(folder, 'losses.jsonl').read_text().splitlines():
        step, loss = json.loads(line)
        assert record.setdefault(step, loss) == loss, f'step {step} differs after the resume'
    return record


def checkpoints(folder, pattern):
    return sorted(Path(folder, 'experiment/checkpoints').glob(pattern))


@pytest.mark.integration
def test_what_a_fault_leaves_is_whole(runs):
    """Every file that bears a checkpoint's name loads, and one is the best, one the last, one the ``.nemo``."""
    for fault in FAULTS:
        names = []
        for path in checkpoints(runs / 'left' / fault, '*.ckpt'):
            assert torch.load(path, map_location='cpu', weights_only=False)['global_step'] in (2, 4, 6)
            names.append(path.name)
        assert any(name.endswith('last.ckpt') for name in names) and any('last' not in name for name in names)
        [nemo] = checkpoints(runs / 'left' / fault, '*.nemo')
        assert weights(nemo)


@pytest.mark.integration
def test_what_is_half_written_bears_no_checkpoints_name(runs):
    for fault, kind in [('while_a_checkpoint_is_written', '.ckpt'), ('while_a_nemo_file_is_packed', '.nemo')]:
        [partial] = checkpoints(runs / 'left' / fault, '.*.partial')
        assert f'{kind}.' in partial.name


@pytest.mark.integration
def test_a_full_disk_is_named_with_the_file(runs):
    text = log(runs / 'left/on_a_full_disk')
    assert 'could not save' in text and 'default.nemo' in text
    assert 'File too large' in text  # the limit's word for what a full disk calls no space left
    assert not checkpoints(runs / 'left/on_a_full_disk', '.*.partial')


@pytest.mark.integration
def test_goes_on_as_if_nothing_had_happened(runs):
    expected = weights(runs / 'none/trained.nemo')
    for fault in FAULTS:
        assert 'Resuming training from checkpoint' in log(runs / fault)
        assert losses(runs / fault) == losses(runs / 'none')
        found = weights(runs / fault / 'trained.nemo')
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.integration
def test_leaves_the_same_checkpoints(runs):
    """The best one, the last one, one ``.nemo``, and nothing of what the killed run was writing."""
    names = {path.name for path in checkpoints(runs / 'none', '*')}
    for fault in FAULTS:
        found = {path.name for path in checkpoints(runs / fault, '*')}
        assert names <= found
        assert {name for name in found if name.endswith(('last.ckpt', '.nemo', '.partial', '-unfinished'))} <= names
