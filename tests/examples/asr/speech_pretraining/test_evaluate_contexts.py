# SPDX-License-Identifier: Apache-2.0
import csv
import json

import pytest
from fresh_process import run_python
from omegaconf import OmegaConf
from tiny_nest import STOCK_OFFLINE, tiny_config, tiny_model

STOCK = """
import sys
from omegaconf import OmegaConf
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel as Model
assert 'site-packages' in sys.modules[Model.__module__].__file__
Model(OmegaConf.load(sys.argv[1])).save_to(sys.argv[2])
"""


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Files of a streaming model, of one with look-ahead, and of an offline one by stock NeMo."""
    folder = tmp_path_factory.mktemp('models')
    tiny_model().save_to(str(folder / 'streaming.nemo'))
    contexts = 'model.encoder.att_context_size=[[28,13],[28,0],[-1,-1]]'
    tiny_model('model.encoder.att_context_style=chunked_limited', contexts).save_to(str(folder / 'chunks.nemo'))
    OmegaConf.save(tiny_config(*STOCK_OFFLINE).model, folder / 'stock.yaml')
    done = run_python('-c', STOCK, folder / 'stock.yaml', folder / 'stock.nemo', patched=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def evaluate(load_example, models, speech_corpus, capsys):
    """Return a function that runs the script on some of the models; gives its status, output and errors."""

    def run(names, *options):
        paths = [str(models / f'{name}.nemo') for name in names]
        manifest = str(speech_corpus / 'validation_manifest.json')
        given = ['--model', *paths, '--manifest', manifest, '--resamples', '50', *options]
        return (load_example('evaluate_contexts').main(given), *capsys.readouterr())

    return run


@pytest.mark.integration
def test_a_stock_checkpoint_beside_a_streaming_model(evaluate, tmp_path):
    files = ['--output', str(tmp_path / 'all.json'), str(tmp_path / 'all.csv')]
    status, out, _ = evaluate(['streaming', 'stock'], '--contexts', '[[10,0],[-1,0]]', *files)
    assert status == 0 and 'masks for a left context of 10' in out
    assert 'stock.nemo is not compared with streaming.nemo' in out
    found = json.loads((tmp_path / 'all.json').read_text())
    assert [model['model'] for model in found['models']] == ['streaming.nemo', 'stock.nemo']
    assert found['settings']['seed'] == 0
    with open(tmp_path / 'all.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['left'], row['right']) for row in rows] == [('10', '0'), ('-1', '0')] * 2
    first = found['models'][0]['contexts'][0]
    assert float(rows[0]['loss_low']) == first['loss_interval'][0] and rows[0]['loss_difference'] == ''
    assert sorted(path.name for path in tmp_path.iterdir()) == ['all.csv', 'all.json']


@pytest.mark.integration
def test_the_look_ahead_of_each_context_is_reported(evaluate, tmp_path):
    status, out, _ = evaluate(['chunks'], '--output', str(tmp_path / 'all.json'))
    assert status == 0 and 'look-ahead' in out and '1040 ms' in out
    (report,) = json.loads((tmp_path / 'all.json').read_text())['models']
    assert [row['look_ahead_ms'] for row in report['contexts']] == [1040, 0, None]


@pytest.mark.integration
@pytest.mark.parametrize(
    'model, options, message',
    [
        ('chunks', ['--contexts', '[[10,0],[20]]'], '--contexts[1]: [20]'),
        ('chunks', ['--contexts', '3'], '--contexts is 3'),
        ('chunks', ['--contexts', '[[10,3]]'], 'chunks.nemo: --contexts[0]: the encoder does not support [10, 3]'),
        ('none', [], 'none.nemo'),
        ('chunks', ['--manifest', '{folder}/empty.json'], 'empty.json'),
        ('chunks', ['--manifest', '{folder}/nowhere_{{0..1}}.json'], 'nowhere_0.json'),
    ],
)
def test_a_run_that_fails_ends_in_one_error(evaluate, tmp_path, model, options, message):
    (tmp_path / 'empty.json').touch()
    status, out, err = evaluate([model], *(option.format(folder=tmp_path) for option in options))
    assert status == 2 and not out
    assert err.startswith('evaluate_contexts: error:') and message in err and 'Traceback' not in err
