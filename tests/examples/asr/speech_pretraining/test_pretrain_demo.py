# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fresh_process
import pytest
from tiny_nest import SMALL

SCRIPT = Path(__file__).resolve().parents[4] / 'examples/asr/speech_pretraining/pretrain_demo.py'


@pytest.mark.integration
def test_trains_restores_and_reports_and_does_not_train_twice(tmp_path, speech_corpus):
    manifests = [f'{option}={speech_corpus}/{name}_manifest.json' for option, name in DATA]
    small = [override for override in SMALL if not override.endswith('=null')]
    small += [
        'trainer.max_steps=2',
        'trainer.log_every_n_steps=1',
        'model.encoder.layer_att_context_size=null',
        '~curriculum',
    ]
    command = ['--output', str(tmp_path), *manifests, '--config', 'nest_hierarchical_streaming_tiny', *small]
    for steps, start, *said in (
        ('0', cold_start, 'Training; TensorBoard logs are in', 'The recogniser is left out: it is to have 0 steps'),
        ('2', warm_start, 'is there already: no training', 'Fine-tuning a recogniser', 'the words as they come'),
        ('2', warm_start, 'is there already: no training', 'is there already: no fine-tuning'),
    ):
        done = start(*command, f'--recogniser-steps={steps}')
        assert done.returncode == 0, done.stderr[-3000:]
        assert all(text in done.stdout for text in [*said, 'What was learned'])
        assert 'largest difference to offline' in done.stdout
        (folder,) = tmp_path.glob('pretrain-*')
        assert (folder / 'model.nemo').exists() and list(folder.glob('run/**/events.out.tfevents.*'))
        for name in ('masked_spectrogram', 'attention_windows', 'learning_curves'):
            assert {(folder / 'pictures' / f'{name}.{ending}').exists() for ending in ('png', 'svg')} == {True}
    start, end = json.loads((folder / 'learned.json').read_text())['models']
    assert (start['model'], end['model']) == ('start', 'end') and len(end['contexts']) == 3
    for before, after in zip(start['contexts'], end['contexts']):
        assert before['masked_frames'] == after['masked_frames'] > 0
        assert before['commonest'] == after['commonest'] and before['loss'] != after['loss']
    rates = json.loads((folder / 'learned.json').read_text())['recogniser']
    assert [list(rates[arm]) for arm in ('pretrained', 'scratch')] == 2 * [['40_0', '20_0', '10_0']]


# The script, and those that it runs, in processes that have imported NeMo.
WARM = """
import sys
import demo_stages
import fresh_process
import pretrain_demo

def run(script, *arguments, **streams):
    done = fresh_process.run_python(demo_stages.HERE / script, *arguments)
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)

demo_stages.run = run
pretrain_demo.main()
"""


def cold_start(*arguments):
    """Run the script as people do, in an interpreter that has imported nothing, as it then runs others."""
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def warm_start(*arguments):
    """Run the script without the minutes that importing NeMo takes in it and in those that it runs."""
    folders = os.pathsep.join([str(SCRIPT.parent), str(Path(fresh_process.__file__).parent)])
    return fresh_process.run_python('-c', WARM, *arguments, PYTHONPATH=folders)


@pytest.mark.integration
def test_half_of_the_demo_learns_and_makes_a_better_recogniser(tmp_path):
    """The demo's own corpus and config, in half of the steps, and the thresholds that the whole demo is to keep."""
    shorter = ['trainer.max_steps=200', 'trainer.val_check_interval=200', 'model.log_figures=false']
    done = warm_start('--output', str(tmp_path), '--recogniser-steps=70', *shorter)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob('pretrain-*/learned.json')
    learned = json.loads(file.read_text())
    assert list(learned['contexts']) == list(learned['recogniser']['scratch']) == ['40_0', '20_0', '10_0']
    for context, row in learned['contexts'].items():
        assert row['loss_end'] < row['unigram_entropy'] - 0.5 < row['loss_start'], context
        assert row['accuracy_end'] > 2 * row['commonest_share'], context
        rates = {arm: learned['recogniser'][arm][context] for arm in ('pretrained', 'scratch')}
        assert rates['pretrained'] < 0.75 * rates['scratch'], (context, rates)


@pytest.mark.integration
def test_dynamic_chunks_are_validated_in_a_fixed_list_and_streamed_in_each_size(tmp_path, speech_corpus):
    manifests = [f'{option}={speech_corpus}/{name}_manifest.json' for option, name in DATA]
    small = [override for override in SMALL if not override.endswith('=null')]
    small += ['trainer.max_steps=2', 'trainer.log_every_n_steps=1']
    config = ['--config', 'nest_fast-conformer_dynamic_chunk_tiny']
    done = warm_start('--output', str(tmp_path), *manifests, *config, '--recogniser-steps=0', *small)
    assert done.returncode == 0, done.stderr[-3000:]
    streamed = re.findall(r'in context (\[.*?\]): largest difference to offline (\S+),', done.stdout)
    assert [context for context, _ in streamed] == ['[42, 13]', '[40, 3]', '[40, 0]']  # chunks of 14, 4 and 1 frames
    assert all(float(difference) < 1e-4 for _, difference in streamed)
    (folder,) = tmp_path.glob('pretrain-*')
    _, end = json.loads((folder / 'learned.json').read_text())['models']
    rows = [(row['context'], row['look_ahead_ms']) for row in end['contexts']]
    assert rows == [([42, 13], 1040), ([40, 3], 240), ([40, 0], 0), ([-1, -1], None)]


DATA = (('--manifest', 'train'), ('--validation-manifest', 'validation'), ('--noise-manifest', 'noise'))


def test_a_train_manifest_needs_a_validation_manifest():
    done = cold_start('--manifest', 'a.json')
    assert done.returncode == 2 and 'go together' in done.stderr


def test_each_choice_of_settings_has_its_own_folder(load_example, tmp_path, speech_corpus, monkeypatch):
    demo = load_example('pretrain_demo')
    data = {role: f'{speech_corpus}/{role}_manifest.json' for role in ('train', 'validation', 'noise')}
    folders = {
        demo.run_folder(demo.arguments([*arguments, '--output', str(tmp_path)]), data)
        for arguments in ([], [], ['trainer.max_steps=7'], ['--config', 'nest_fast-conformer_streaming_tiny'])
    }
    assert len(folders) == 3 and all(os.path.isfile(folder / 'settings.json') for folder in folders)
