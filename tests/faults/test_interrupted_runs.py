# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed or meet a full disk lose no checkpoint, and go on as if nothing had happened."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from shared_results import shared_folder
from tiny_nest import restored_weights as weights

pytestmark = pytest.mark.integration
SCRIPT = Path(__file__).with_name('training_runs.py')
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

    def run(folder, status, *fault):
        folder.mkdir(exist_ok=True)
        done = run_python(SCRIPT, folder, speech_corpus, *fault)
        (folder / 'log.txt').write_text(done.stdout + done.stderr)
        assert done.returncode == status, done.stderr[-3000:]

    def make(root):
        run(root / 'none', 0)
        for fault in FAULTS:
            run(root / fault, -signal.SIGKILL if fault in KILLS else 1, fault)
            shutil.copytree(root / fault, root / 'left' / fault)
            run(root / fault, 0)

    return shared_folder(tmp_path_factory, 'interrupted_runs', make)


def losses(folder):
    """Step -> loss; of a step that was repeated, both must be the same."""
    record = {}
    for step, loss in map(json.loads, (folder / 'losses.jsonl').read_text().splitlines()):
        assert record.setdefault(step, loss) == loss, f'step {step} differs after the resume'
    return record


def checkpoints(folder, pattern):
    return sorted(Path(folder, 'experiment/checkpoints').glob(pattern))


@pytest.mark.parametrize('fault', FAULTS)
def test_what_a_fault_leaves_is_whole(runs, fault):
    """Every file that has a checkpoint's name loads, and one is the best, one the last, one the ``.nemo``."""
    left = checkpoints(runs / 'left' / fault, '*.ckpt')
    for path in left:
        assert torch.load(path, map_location='cpu', weights_only=False)['global_step'] in (2, 4, 6)
    names = [path.name for path in left]
    assert any(name.endswith('last.ckpt') for name in names) and any('last' not in name for name in names)
    (nemo,) = checkpoints(runs / 'left' / fault, '*.nemo')
    assert weights(nemo)


def test_a_half_written_file_has_no_checkpoints_name(runs):
    for fault, kind in [('while_a_checkpoint_is_written', '.ckpt'), ('while_a_nemo_file_is_packed', '.nemo')]:
        (partial,) = checkpoints(runs / 'left' / fault, '.*.partial')
        assert f'{kind}.' in partial.name


def test_a_full_disk_is_named_with_the_file(runs):
    text = (runs / 'left/on_a_full_disk/log.txt').read_text()
    assert 'could not save' in text and 'default.nemo' in text
    assert 'File too large' in text  # the limit's word for what a full disk calls no space left
    assert not checkpoints(runs / 'left/on_a_full_disk', '.*.partial')


@pytest.mark.parametrize('fault', FAULTS)
def test_goes_on_as_if_nothing_had_happened(runs, fault):
    assert 'Resuming training from checkpoint' in (runs / fault / 'log.txt').read_text()
    assert losses(runs / fault) == losses(runs / 'none')
    expected, found = weights(runs / 'none/trained.nemo'), weights(runs / fault / 'trained.nemo')
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    names, made = ({path.name for path in checkpoints(runs / name, '*')} for name in ('none', fault))
    assert names <= made  # the best one, the last one, one .nemo, and nothing of what the killed run was writing
    assert {name for name in made if name.endswith(('last.ckpt', '.nemo', '.partial', '-unfinished'))} <= names
