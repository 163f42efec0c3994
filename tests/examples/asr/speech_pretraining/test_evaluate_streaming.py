# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import soundfile
from tiny_nest import tiny_model
from tiny_recogniser import tiny_recogniser


@pytest.fixture
def evaluate(load_example, capsys):
    script = load_example('evaluate_streaming')

    def run(model, *options):
        status = script.main(['--model', str(model), *map(str, options)])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    contexts = 'model.encoder.att_context_size=[[4,0],[8,0],[-1,-1]]'
    tiny_model(contexts, '+model.objective=next_token').save_to(str(folder / 'next.nemo'))
    tiny_model(contexts).save_to(str(folder / 'masked.nemo'))
    tiny_recogniser('rnnt').save_to(str(folder / 'rnnt.nemo'))
    return folder


def test_a_manifest_goes_on_after_bad_files(evaluate, models, audio_folder, tmp_path):
    manifest, report = audio_folder / 'evaluated.json', tmp_path / 'report.json'
    soundfile.write(tmp_path / 'long.wav', np.random.default_rng(0).standard_normal(40000) * 0.1, 16000)
    names = ['cut.wav', str(tmp_path / 'long.wav'), 'gone.wav']
    manifest.write_text(''.join(json.dumps({'audio_filepath': name}) + '\n' for name in names))
    status, out, err = evaluate(models / 'next.nemo', '--manifest', manifest, '--surprise', '--output', report)
    assert status == 2 and err.count('evaluate_streaming: error:') == 2 and 'cut.wav' in err and 'gone.wav' in err
    assert [word for word in ('[4, 0]', '[8, 0]', 'surprise', '1 audios') if word not in out] == []
    assert 'WER' not in out and '-1' not in out  # what the model does not have
    content = json.loads(report.read_text())
    assert [entry['att_context_size'] for entry in content['contexts']] == [[4, 0], [8, 0]]
    assert len(content['failed']) == 2 and len(content['audio']) == 1
    for entry in content['contexts']:
        assert entry['largest_difference'] <= 1e-4 and entry['token_agreement'] == 1.0
        assert entry['look_ahead_ms'] == 12.5 and entry['cache_bytes_per_stream'] > 0


def test_a_recogniser_has_error_rates_and_latencies(evaluate, models, audio_folder, tmp_path):
    manifest, report = audio_folder / 'spoken.json', tmp_path / 'report.json'
    manifest.write_text(json.dumps({'audio_filepath': 'mono.wav', 'text': 'a ban'}))
    given = ['--manifest', manifest, '--att-context-size', '[10,0]', '4', '--output', report]
    status, out, _ = evaluate(models / 'rnnt.nemo', *given)
    assert status == 0 and 'WER' in out and 'latency' in out and 'surprise' not in out
    content = json.loads(report.read_text())
    assert [entry['att_context_size'] for entry in content['contexts']] == [[10, 0], [4, 0]]
    assert all(entry['wer'] > 0 and entry['cer'] > 0 for entry in content['contexts'])
    assert len(content['audio'][0]['contexts'][0]['pred_text']) > 3


@pytest.mark.parametrize(
    ('model', 'options', 'reason'),
    [
        ('gone.nemo', [], 'gone.nemo: there is no such file'),
        ('masked.nemo', ['--surprise'], 'model.objective'),
        ('masked.nemo', ['--att-context-size', '[4,-1]'], 'cannot be streamed'),
        ('masked.nemo', ['--att-context-size', 'lowest'], 'lowest'),
    ],
)
def test_what_cannot_run_ends_in_one_error(evaluate, models, audio_folder, model, options, reason):
    status, _, err = evaluate(models / model, audio_folder / 'mono.wav', *options)
    assert status == 2 and reason in err and err.count('evaluate_streaming: error:') == 1


def test_wrong_options_are_refused(evaluate):
    for options in (
        ['a.wav', '--step-seconds', '0'],
        [],
        ['a.wav', '--manifest', 'b.json'],
        ['a.wav', '--output', 'no/x'],
    ):
        with pytest.raises(SystemExit) as ended:
            evaluate('m.nemo', *options)
        assert ended.value.code == 2
