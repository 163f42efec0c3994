# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
import csv
import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from tiny_nest import tiny_config, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecMaskedTokenPredModel

OFFLINE = [
    'model.encoder.causal_downsampling=false',
    'model.encoder.conv_context_size=null',
    'model.encoder.conv_norm_type=batch_norm',
    'model.encoder.att_context_size=[-1,-1]',
    'model.preprocessor.normalize=per_feature',
    '~model.target_normalize',
    '~model.validate_contexts',
    '~model.validation_masks',
    '~model.audit_every_n_batches',
    '~model.log_figures',
    '~model.encoder.att_context_seed',
    '~model.encoder.blockwise_attention',
    '~model.loss.decoder_offset',
    '~model.masking.causal',
]
STOCK = """
import sys
from omegaconf import OmegaConf
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel as Model
assert 'site-packages' in sys.modules[Model.__module__].__file__
Model(OmegaConf.load(sys.argv[1])).save_to(sys.argv[2])
"""


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Files of a streaming model, one without noise, another streaming one, and an offline one by stock NeMo."""
    folder = tmp_path_factory.mktemp('models')
    tiny_model().save_to(str(folder / 'streaming.nemo'))
    tiny_model(seed=1).save_to(str(folder / 'other.nemo'))
    tiny_model(cls=EncDecMaskedTokenPredModel).save_to(str(folder / 'clean.nemo'))
    OmegaConf.save(tiny_config(*OFFLINE).model, folder / 'stock.yaml')
    command = [sys.executable, '-c', STOCK, str(folder / 'stock.yaml'), str(folder / 'stock.nemo')]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'NEMO_STREAMING_SSL': '0'})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def evaluate(load_example, models, speech_corpus, capsys):
    """Return a function that runs the script on some of the models; gives its status, output and errors."""
    script = load_example('evaluate_contexts')

    def run(names, *options):
        paths = [str(models / f'{name}.nemo') for name in names]
        manifest = str(speech_corpus / 'validation_manifest.json')
        status = script.main(['--model_path', *paths, '--manifest', manifest, '--resamples', '50', *options])
        return (status, *capsys.readouterr())

    return run


@pytest.mark.integration
def test_models_side_by_side_with_a_stock_checkpoint(evaluate, tmp_path, speech_corpus):
    files = ['--json', str(tmp_path / 'all.json'), '--csv', str(tmp_path / 'all.csv')]
    names = ['streaming', 'other', 'clean', 'stock']
    status, out, _ = evaluate(names, '--contexts', '[[10,0],[-1,0]]', *files)
    assert status == 0 and 'masks for a left context of 10' in out and 'other.nemo' in out

    found = json.loads((tmp_path / 'all.json').read_text())
    assert [os.path.basename(model['model']) for model in found['models']] == [f'{name}.nemo' for name in names]
    utterances = len((speech_corpus / 'validation_manifest.json').read_text().splitlines())
    for model in found['models']:
        for row in model['contexts']:
            assert row['utterances'] == utterances and row['masked_frames'] > 0
            low, high = row['loss_interval']
            assert low <= row['loss'] <= high and 0 <= row['accuracy'] <= 1 and row['perplexity'] > 1
    streaming, other, clean, _ = (model['contexts'] for model in found['models'])
    assert streaming[0]['loss'] == pytest.approx(
        clean[0]['loss'], rel=1e-5
    )  # there is no noise, and the weights agree
    assert streaming[0]['loss_difference'] is None
    difference = other[1]['loss_difference']
    assert difference['value'] == pytest.approx(other[1]['loss'] - streaming[1]['loss'], abs=1e-6)
    assert difference['interval'][0] <= difference['value'] <= difference['interval'][1]

    with open(tmp_path / 'all.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['left'], row['right']) for row in rows] == [('10', '0'), ('-1', '0')] * 4
    assert float(rows[3]['loss_difference']) == pytest.approx(difference['value'])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['all.csv', 'all.json']


@pytest.mark.integration
def test_each_model_in_its_own_contexts_whatever_the_batches(evaluate, tmp_path):
    reports = []
    for size in ('1', '5'):
        options = ['--batch_size', size, '--draws', '2', '--json', str(tmp_path / 'report.json')]
        assert evaluate(['streaming'], *options)[0] == 0
        (report,) = json.loads((tmp_path / 'report.json').read_text())['models']
        reports.append(report)
    assert [row['context'] for row in reports[0]['contexts']] == [[10, 0], [20, 0], [40, 0], [-1, 0]]
    for one, other in zip(*(report['contexts'] for report in reports)):
        assert one['masked_frames'] == other['masked_frames']
        assert one['loss'] == pytest.approx(other['loss'], rel=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize(
    'options, message',
    [
        (['--contexts', '[[10,0],[20]]'], r'--contexts[1]: [20] is no context'),
        (['--contexts', '["far"]'], "no preset is called 'far'"),
        (['--contexts', '3'], '--contexts is 3; it must be one of'),
    ],
)
def test_what_cannot_be_followed_ends_in_one_error(evaluate, options, message):
    status, out, err = evaluate(['streaming'], *options)
    assert status == 2 and not out and err.count('evaluate_contexts: error:') == 1
    assert message in err and 'streaming.nemo' in err and 'Traceback' not in err


@pytest.mark.integration
def test_an_encoder_that_cannot_follow_a_context_is_named(evaluate, models):
    tiny_model('model.encoder.att_context_style=chunked_limited', 'model.encoder.att_context_size=[[8,3]]').save_to(
        str(models / 'chunks.nemo')
    )
    status, _, err = evaluate(['streaming', 'chunks'], '--contexts', '[[10,3]]')
    assert status == 2 and 'chunks.nemo: --contexts[0]: the encoder cannot follow [10, 3]' in err


@pytest.mark.unit
def test_bad_arguments(load_example, tmp_path, capsys):
    script = load_example('evaluate_contexts')
    (tmp_path / 'manifest.json').write_text('')
    good = ['--model_path', 'no.nemo', '--manifest', str(tmp_path / 'manifest.json')]
    for bad, message in (
        (['--manifest', 'nowhere.json'], 'nowhere.json: there is no such file'),
        (['--contexts', '[[10,0'], 'is no JSON list of contexts'),
        (['--confidence', '1.5'], '--confidence must lie between 0 and 1'),
        (['--draws', '0'], '--draws, --resamples and --batch_size 1 or more'),
        (['--mask_context', '-2'], '--mask_context must be -1'),
        (['--csv', str(tmp_path / 'none/x.csv')], 'there is no folder'),
    ):
        with pytest.raises(SystemExit) as ended:
            script.arguments([*good, *bad])
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert script.main(good) == 2
    assert 'no.nemo: there is no such file' in capsys.readouterr().err
