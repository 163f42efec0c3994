# SPDX-License-Identifier: Apache-2.0
import csv
import json
import os

import pytest
from fresh_process import run_python
from omegaconf import OmegaConf
from tiny_nest import STOCK_OFFLINE, tiny_config, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecMaskedTokenPredModel

STOCK = """
import sys
from omegaconf import OmegaConf
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel as Model
assert 'site-packages' in sys.modules[Model.__module__].__file__
Model(OmegaConf.load(sys.argv[1])).save_to(sys.argv[2])
"""


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Files of streaming models of one quantizer, one of another, one without noise, and an offline one by stock NeMo."""
    folder = tmp_path_factory.mktemp('models')
    streaming = tiny_model()
    streaming.save_to(str(folder / 'streaming.nemo'))
    others = {'other': [], 'next_token': ['+model.objective=next_token'], 'both': ['+model.objective=both']}
    for name, overrides in others.items():
        made = tiny_model(*overrides, seed=1)
        made.quantizer.load_state_dict(streaming.quantizer.state_dict())
        made.save_to(str(folder / f'{name}.nemo'))
    tiny_model(seed=1).save_to(str(folder / 'other_targets.nemo'))
    tiny_model(cls=EncDecMaskedTokenPredModel).save_to(str(folder / 'clean.nemo'))
    OmegaConf.save(tiny_config(*STOCK_OFFLINE).model, folder / 'stock.yaml')
    done = run_python('-c', STOCK, folder / 'stock.yaml', folder / 'stock.nemo', patched=False)
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
def test_models_of_different_objectives(evaluate, tmp_path):
    files = ['--json', str(tmp_path / 'all.json'), '--csv', str(tmp_path / 'all.csv')]
    names = ['both', 'streaming', 'next_token', 'other_targets']
    status, out, _ = evaluate(names, '--contexts', '[[10,0],[-1,0]]', *files)
    assert status == 0 and 'unigram entropy' in out and 'masked-token' not in out

    found = json.loads((tmp_path / 'all.json').read_text())['models']
    parts = [[row['part'] for row in model['contexts'] if row['context'] == [10, 0]] for model in found]
    horizons = ['next_0', 'next_1', 'next_2', 'next_3', 'next']
    assert parts == [['masked', *horizons], ['masked'], horizons, ['masked']]
    assert [model['objective'] for model in found] == ['both', 'masked', 'next_token', 'masked']
    assert [model['mask_context'] for model in found] == [10, 10, None, 10]
    for model in found:
        for row in model['contexts']:
            assert row['below_unigram'] == pytest.approx(row['unigram_entropy'] - row['loss'])
            assert ('masked_frames' in row) == (row['part'] == 'masked') == ('next_token_offset' not in row)
    both, masked, following, other = found
    assert both['not_compared'] == [] and {row['loss_difference'] for row in both['contexts']} == {None}
    assert all(
        row['loss_difference'] and not row['not_compared'] for row in masked['contexts'] + following['contexts']
    )
    first = both['contexts'][1]
    assert following['contexts'][0]['loss_difference']['value'] == pytest.approx(
        following['contexts'][0]['loss'] - first['loss'], abs=1e-6
    )
    assert (first['frames'], first['commonest']) == tuple(
        following['contexts'][0][name] for name in ('frames', 'commonest')
    )
    where = [[10, 0], [-1, 0]]
    assert masked['not_compared'] == [{'why': 'it has no such part', 'parts': horizons, 'contexts': where}]
    assert following['not_compared'] == [{'why': 'it has no such part', 'parts': ['masked'], 'contexts': where}]
    assert {row['loss_difference'] for row in other['contexts']} == {None}
    written = ' '.join(out.split())
    assert 'next_token.nemo cannot be compared with both.nemo in masked: it has no such part' in written
    assert 'other_targets.nemo cannot be compared with both.nemo in masked: its targets are other tokens' in written

    with open(tmp_path / 'all.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (6 + 1 + 5 + 1)
    assert [row['part'] for row in rows[:6]] == ['masked', *horizons]
    assert rows[1]['masked_frames'] == '' and int(rows[1]['frames']) == first['frames']
    assert rows[1]['next_token_offset'] == '0' and float(rows[1]['below_unigram']) == first['below_unigram']
    assert rows[-1]['not_compared'].startswith('its targets are other tokens') and rows[-1]['loss_difference'] == ''


@pytest.mark.integration
def test_next_tokens_alone_need_no_masks(evaluate):
    status, out, _ = evaluate(['next_token'], '--contexts', 'first')
    assert status == 0 and 'masks' not in out and 'cannot be compared' not in out


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
def test_the_look_ahead_of_each_context_is_reported(evaluate, models, tmp_path):
    contexts = 'model.encoder.att_context_size=[[28,13],[28,1],[28,0],[-1,-1]]'
    tiny_model('model.encoder.att_context_style=chunked_limited', contexts).save_to(str(models / 'latencies.nemo'))
    files = ['--json', str(tmp_path / 'all.json'), '--csv', str(tmp_path / 'all.csv')]
    status, out, _ = evaluate(['latencies'], *files)
    assert status == 0 and 'look-ahead' in out and '1040 ms' in out
    (report,) = json.loads((tmp_path / 'all.json').read_text())['models']
    assert [row['look_ahead_ms'] for row in report['contexts']] == [1040, 80, 0, None]
    with open(tmp_path / 'all.csv', newline='') as file:
        assert [row['look_ahead_ms'] for row in csv.DictReader(file)] == ['1040.0', '80.0', '0.0', '']


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
