# SPDX-License-Identifier: Apache-2.0
"""One arm from noise to its result, in a few steps."""

import json
import os

import pytest
from fresh_process import run_python

SIZES = dict(seconds=2, layers=1, width=16, classes=16, pretraining_steps=10, pretraining_batch=2)
SIZES |= dict(fine_tuning_steps=5, fine_tuning_batch=2, larger_minutes=0.1, smaller_minutes=0.05, live_utterances=2)
CONTEXTS = {'5_0', '10_0', '20_0', '-1_0'}


@pytest.fixture(scope='module')
def run(load):
    return load('run')


@pytest.fixture
def command(run, make_manifest, tmp_path, monkeypatch):
    """Return the command line; scripts run where NeMo is imported, and are noted."""
    started = []

    def launch(script, *words):
        started.append(script.name)
        done = run_python(script, *words, OMP_NUM_THREADS='1')
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    monkeypatch.setattr(run, 'launch', launch)
    train = make_manifest(tmp_path / 'train', [f'a{n}' for n in range(6)], [1.2, 1.0])
    test = make_manifest(tmp_path / 'test', ['y', 'z'], [1.2, 1.0], phones='AH B K IY')
    words = [f'--{role}={train}' for role in ('pretraining', 'validation', 'tuning')]
    words += [f'--test={test}', f"--work={tmp_path / 'work'}", f"--results={tmp_path / 'results'}", '--seed=0']
    return words + [f'--{name}={value}' for name, value in SIZES.items()], started


@pytest.mark.integration
def test_an_arm_goes_from_noise_to_its_result_and_what_is_done_is_left_alone(run, command, tmp_path):
    words, started = command
    assert run.main([*words, '--arm', 'stock-short']) == 0
    training = ['pretrain_context_free.py', 'finetune_streaming.py', 'finetune_streaming.py']
    assert started == ['compute_feature_stats.py', *training]
    path = tmp_path / 'results/stock-short-0.json'
    found = json.loads(path.read_text())
    assert (found['arm'], found['seed'], found['settings']['width']) == ('stock-short', 0, 16)
    assert found['test'] == {'utterances': ['y_y-0', 'z_z-0'], 'speakers': ['y', 'z'], 'phones': [8, 8]}
    assert set(found['data']) == {'pretraining', 'validation', 'tuning', 'test'}
    assert set(found['errors']) == {'0.1', '0.05'}
    for errors in found['errors'].values():
        assert set(errors) == CONTEXTS and all(len(of) == 2 and min(of) > 0 for of in errors.values())
    for live in found['live']['contexts'].values():
        assert live['same_texts'] == 2 and live['errors'] == live['errors_offline']
    assert found['masks']['block_size'] <= 40 and 0 < found['pretraining']['audit/masked_share'] < 1
    assert {'train_loss', 'val_loss'} <= set(found['pretraining'])
    assert 'val_wer' in found['fine_tuning']['0.1'] and found['versions']['nemo']
    assert_resumes(run, command, path)


def assert_resumes(run, command, path):
    """Without its result the same is collected again; without a stage that stage alone is done again."""
    (words, started), whole = command, path.read_bytes()
    started.clear()
    path.unlink()
    work = path.parents[1] / 'work/stock-short-0'
    (work / 'tuned-0.05.nemo').unlink()
    (work / 'scores-0.05.json').unlink()
    assert run.main([*words, '--arm', 'stock-short']) == 0
    assert started == ['finetune_streaming.py']
    again, before = json.loads(path.read_bytes()), json.loads(whole)
    assert again['errors'] == before['errors']
    assert run.main([*words, '--arm', 'stock-short']) == 0 and started == ['finetune_streaming.py']
    assert run.main([*words[:-1], '--live_utterances=1', '--arm', 'stock-short']) == 2  # other settings


def test_what_another_process_works_on_is_left_to_it(run, tmp_path):
    with run.locked(tmp_path / 'a.lock', wait=False) as free:
        assert free
        with run.locked(tmp_path / 'a.lock', wait=False) as also:
            assert not also
    with run.locked(tmp_path / 'a.lock', wait=False) as free:
        assert free


def test_checkpoints_come_at_whole_parts_of_a_run(run):
    assert run.validations(3000, 500)[:2] == ['trainer.max_steps=3000', 'trainer.val_check_interval=500']
    assert run.validations(7, 5)[1] == 'trainer.val_check_interval=1'
    assert run.validations(20, 20)[1] == 'trainer.val_check_interval=20'


def test_a_mistake_ends_in_one_message_before_any_work(run, tmp_path, capsys):
    words = [f'--{role}={tmp_path}/none.json' for role in ('pretraining', 'validation', 'tuning', 'test')]
    words += [f"--work={tmp_path / 'work'}"]
    assert run.main([*words, '--arm', 'nonsense']) == 2
    assert "--arm is 'nonsense'" in capsys.readouterr().err and not os.path.exists(tmp_path / 'work')
    assert run.main([*words, '--arm', 'stock']) == 2
    assert 'none.json cannot be read' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.arguments(words)
