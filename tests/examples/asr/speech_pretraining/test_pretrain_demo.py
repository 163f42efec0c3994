# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
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
    command = ['--output', str(tmp_path), *manifests, *small]
    for said, start in (
        ('Training; TensorBoard logs are in', cold_start),
        ('is there already: no training', warm_start),
    ):
        done = start(*command)
        assert done.returncode == 0, done.stderr[-3000:]
        assert said in done.stdout and 'What was learned' in done.stdout
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


# The script, and those that it runs, in processes that have imported NeMo.
WARM = """
import sys
import fresh_process
import pretrain_demo

def run(script, *arguments, **streams):
    done = fresh_process.run_python(pretrain_demo.HERE / script, *arguments)
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)

pretrain_demo.run = run
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
def test_dynamic_chunks_are_validated_in_a_fixed_list_and_streamed_in_each_size(tmp_path, speech_corpus):
    manifests = [f'{option}={speech_corpus}/{name}_manifest.json' for option, name in DATA]
    small = [override for override in SMALL if not override.endswith('=null')]
    small += ['trainer.max_steps=2', 'trainer.log_every_n_steps=1']
    config = ['--config', 'nest_fast-conformer_dynamic_chunk_tiny']
    done = warm_start('--output', str(tmp_path), *manifests, *config, *small)
    assert done.returncode == 0, done.stderr[-3000:]
    streamed = re.findall(r'in context (\[.*?\]): largest difference to offline (\S+),', done.stdout)
    assert [context for context, _ in streamed] == ['[42, 13]', '[40, 3]', '[40, 0]']  # chunks of 14, 4 and 1 frames
    assert all(float(difference) < 1e-4 for _, difference in streamed)
    (folder,) = tmp_path.glob('pretrain-*')
    _, end = json.loads((folder / 'learned.json').read_text())['models']
    rows = [(row['context'], row['look_ahead_ms']) for row in end['contexts']]
    assert rows == [([42, 13], 1040), ([40, 3], 240), ([40, 0], 0), ([-1, -1], None)]


DATA = (('--manifest', 'train'), ('--validation-manifest', 'validation'), ('--noise-manifest', 'noise'))


@pytest.mark.unit
def test_a_train_manifest_needs_a_validation_manifest():
    done = cold_start('--manifest', 'a.json')
    assert done.returncode == 2 and 'go together' in done.stderr


@pytest.mark.unit
def test_each_choice_of_settings_has_its_own_folder(load_example, tmp_path, speech_corpus, monkeypatch):
    demo = load_example('pretrain_demo')
    data = {role: f'{speech_corpus}/{role}_manifest.json' for role in ('train', 'validation', 'noise')}
    folders = {
        demo.run_folder(demo.arguments([*arguments, '--output', str(tmp_path)]), data)
        for arguments in ([], [], ['trainer.max_steps=7'], ['--config', 'nest_fast-conformer_streaming_tiny'])
    }
    assert len(folders) == 3 and all(os.path.isfile(folder / 'settings.json') for folder in folders)


@pytest.mark.unit
@pytest.mark.parametrize('parts, shown', [(['masked'], False), (['next_0', 'next'], True), (['masked', 'next'], True)])
def test_the_table_says_what_each_row_is_of(load_example, parts, shown):
    figures = dict(loss=3.0, loss_interval=[2.9, 3.1], accuracy=0.25, accuracy_interval=[0.2, 0.3], perplexity=20.1)
    row = dict(context=[10, 0], commonest=0.1, look_ahead_ms=0, utterances=4, not_compared=None, **figures)
    result = dict(
        contexts=[{**row, 'part': part} for part in parts],
        codebook=dict(codes_used=60, classes=64, perplexity=41.0, top_share=0.1),
        not_compared=[],
    )
    table = load_example('pretrain_demo').learning_table(result, result)
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert ('part' in columns) == shown and ('masked frames' in table.title) != shown
    if shown:
        assert columns['part'] == parts
    assert columns['loss at start'] == ['3.000'] * len(parts)
