# SPDX-License-Identifier: Apache-2.0
import json
import os
from pathlib import Path

import fresh_process
import pytest
from tiny_nest import SMALL

SCRIPT = Path(__file__).resolve().parents[4] / 'examples/asr/speech_pretraining/pretrain_demo.py'

# The script, and those that it runs, in processes that have imported NeMo.
WARM = """
import fresh_process
import pretrain_demo

def run_stage(title, log, script, *words, **environment):
    done = fresh_process.run_python(pretrain_demo.HERE / script, *words)
    log.write_text(done.stdout + done.stderr)
    print(title)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])

pretrain_demo.run_stage = run_stage
pretrain_demo.main()
"""


def warm_start(*arguments):
    """Run the script without the time that importing NeMo takes in it and in its stages."""
    folders = os.pathsep.join([str(SCRIPT.parent), str(Path(fresh_process.__file__).parent)])
    done = fresh_process.run_python('-c', WARM, *arguments, PYTHONPATH=folders)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.integration
def test_pretrains_fine_tunes_compares_streams_and_does_nothing_twice(tmp_path, speech_corpus):
    command = ['--output', str(tmp_path), '--manifest', f'{speech_corpus}/train_manifest.json']
    command += ['--validation-manifest', f'{speech_corpus}/validation_manifest.json', '--recogniser-steps=2']
    command += [override for override in SMALL if not override.endswith('=null')]
    command += ['trainer.max_steps=2', 'model.encoder.layer_att_context_size=null', '~curriculum']
    first, again = warm_start(*command), warm_start(*command)
    assert 'complete already' not in first and again.count('complete already') == 3
    for output in (first, again):
        assert 'Character error rate' in output and 'Streaming a test sentence' in output
    (folder,) = tmp_path.glob('pretrain-*')
    rates = json.loads((folder / 'error_rates.json').read_text())
    assert set(rates) == {'pre-trained', 'from scratch'}
    assert all(set(row) == {'[40, 0]', '[20, 0]', '[10, 0]'} for row in rates.values())


def test_a_failed_stage_ends_the_demo_with_the_end_of_its_log(load_example, tmp_path, capsys):
    with pytest.raises(SystemExit, match='2'):
        load_example('pretrain_demo').run_stage('a stage', tmp_path / 'stage.log', 'make_speech_corpus.py')
    assert '--output' in capsys.readouterr().out
    assert '--output' in (tmp_path / 'stage.log').read_text()
