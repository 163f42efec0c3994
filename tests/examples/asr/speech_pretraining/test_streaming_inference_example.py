# SPDX-License-Identifier: Apache-2.0
import argparse
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fresh_process import run_python
from tiny_nest import tiny_model
from tiny_recogniser import tiny_recogniser

SCRIPT = Path(__file__).resolve().parents[4] / 'examples/asr/speech_pretraining/streaming_inference_example.py'
RATE = 16000


@pytest.fixture(scope='module')
def script(load_example):
    return load_example('streaming_inference_example')


@pytest.fixture(scope='module')
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'model.nemo'
    tiny_model('model.encoder.att_context_size=[[4,0],[8,0]]').save_to(str(path))
    return path


@pytest.mark.parametrize('size', [1, 333, 2560])
def test_pcm_is_read_to_its_end(script, size):
    samples = (np.arange(1000, dtype='<i2') - 500) * 60
    heard = []
    pipe = io.BytesIO(samples.tobytes() + b'\x01')  # half a sample at the end counts for nothing
    pieces = list(script.stdin_chunks(pipe, RATE, RATE, size / RATE, heard))
    joined = np.concatenate([piece[0].numpy() for piece in pieces])
    np.testing.assert_array_equal(joined, samples.astype(np.float32) / 32768)
    np.testing.assert_array_equal(joined, np.concatenate(heard))
    assert {piece.shape[1] for piece in pieces[:-1]} <= {size}


def test_pcm_of_another_rate_is_resampled_as_it_comes(script):
    tone = np.sin(np.arange(8000) * 0.3) * 20000
    pipe = io.BytesIO(tone.astype('<i2').tobytes())
    joined = np.concatenate([piece[0].numpy() for piece in script.stdin_chunks(pipe, 8000, RATE, 0.05, [])])
    assert abs(len(joined) - RATE) <= 16
    expected = np.sin(np.arange(len(joined)) * 0.15) * 20000 / 32768
    np.testing.assert_allclose(joined[500:-500], expected[500:-500], atol=0.01)


@pytest.mark.parametrize('kind', ['ctc', 'rnnt'])
def test_a_recogniser_shows_its_words_their_latency_and_its_errors(script, kind, audio_folder, tmp_path, capsys):
    tiny_recogniser(kind).save_to(str(tmp_path / 'model.nemo'))
    arguments = ['--model_path', str(tmp_path / 'model.nemo'), '--att_context_size', '[10,0]']
    report, manifest = tmp_path / 'report.json', audio_folder / 'texts.json'
    manifest.write_text(lines({'audio_filepath': 'mono.wav', 'text': 'a ban'}, {'audio_filepath': 'mono.wav'}))
    assert script.main([*arguments, '--manifest', str(manifest), '--report', str(report)]) == 0
    printed, content = capsys.readouterr().out, json.loads(report.read_text())
    first, second = (entry['contexts'][0] for entry in content['audio'])
    assert first['text'] == second['text'] and len(first['text']) > 3
    assert 'wer' not in second and 0 < first['cer'] == content['recognition']['[10, 0]']['cer']
    assert f"[10, 0] heard: {first['text']}" in printed and 'said: a ban' in printed and 'word errors' in printed
    assert first['word_latency_ms_p95'] >= first['word_latency_ms_p50'] >= 0
    assert script.main([*arguments, '--audio_path', str(audio_folder / 'mono.wav')]) == 0
    words = re.findall(r' s  (\S+)  \(until .* ms ago\)', capsys.readouterr().out)
    assert words == first['text'].split()
    small = ['--audio_path', str(audio_folder / 'mono.wav'), '--weights', 'int8', '--compare_modes']
    assert script.main([*arguments, *small]) == 0
    difference = float(re.search(r'largest difference to offline (\S+?),', capsys.readouterr().out)[1])
    assert 1e-3 < difference < 1


def lines(*entries):
    return ''.join((entry if isinstance(entry, str) else json.dumps(entry)) + '\n' for entry in entries)


def test_a_manifest_goes_on_after_bad_files_and_the_status_says_so(script, model_path, audio_folder, tmp_path, capsys):
    manifest, report, plot = audio_folder / 'manifest.json', tmp_path / 'report.json', tmp_path / 'plot.png'
    manifest.write_text(
        lines({'audio_filepath': 'cut.wav'}, 'no json', {'audio_filepath': 'mono.wav'}, {'audio_filepath': 'gone.wav'})
    )
    arguments = ['--model_path', str(model_path), '--manifest', str(manifest), '--compare_modes']
    status = script.main([*arguments, '--report', str(report), '--plot', str(plot)])
    printed = capsys.readouterr()
    assert status == 1
    assert all(name in printed.err for name in ('cut.wav', 'gone.wav', 'manifest.json, line 2', '3 of 4'))
    assert printed.out.count('largest difference to offline') == 2
    content = json.loads(report.read_text())
    assert [entry['audio'] for entry in content['audio']] == ['mono.wav'] and len(content['failed']) == 3
    contexts = content['audio'][0]['contexts']
    assert [entry['att_context_size'] for entry in contexts] == [[4, 0], [8, 0]]
    for entry in contexts:
        assert entry['largest_difference'] <= 1e-4 and entry['token_agreement'] == 1.0
        assert entry['look_ahead_ms'] == 12.5 and entry['cache_bytes_per_stream'] > 0
        assert entry['chunk_ms_p50'] <= entry['chunk_ms_p95'] <= entry['chunk_ms_max']
    assert plot.read_bytes().startswith(b'\x89PNG') and plot.stat().st_size > 20000
    assert sorted(path.name for path in tmp_path.iterdir()) == ['plot.png', 'report.json']


def test_one_context_is_streamed_without_offline(script, model_path, audio_folder, capsys):
    arguments = ['--model_path', str(model_path), '--audio_path', str(audio_folder / 'mono.wav')]
    assert script.main([*arguments, '--att_context_size', '[6,0]', '--chunk_size', '0.037']) == 0
    printed = capsys.readouterr().out
    assert '[6,0]' in printed and 'offline' not in printed


@pytest.fixture(scope='module')
def next_token_path(tmp_path_factory):
    path = tmp_path_factory.mktemp('next') / 'model.nemo'
    objective = ('+model.objective=next_token', '+model.next_token.horizons=2')
    tiny_model('model.encoder.att_context_size=[[4,0],[8,0]]', *objective).save_to(str(path))
    return path


def test_surprise_is_told_second_by_second_reported_and_drawn(script, next_token_path, audio_folder, tmp_path, capsys):
    report, plot = tmp_path / 'report.json', tmp_path / 'surprise.png'
    soundfile.write(tmp_path / 'long.wav', np.random.default_rng(0).standard_normal(40000) * 0.1, RATE)
    arguments = ['--model_path', str(next_token_path), '--audio_path', str(tmp_path / 'long.wav'), '--compare_modes']
    assert script.main([*arguments, '--report', str(report), '--surprise_plot', str(plot)]) == 0
    printed = capsys.readouterr().out
    contexts = json.loads(report.read_text())['audio'][0]['contexts']
    for entry in contexts:
        told = [line for line in printed.splitlines() if line.startswith(f"long.wav {entry['att_context_size']}  ")]
        assert [line.split(':')[0].split()[-1] for line in told] == ['0', '1', '2']
        assert told[-1].endswith(f"mean so far {entry['mean_surprise']:.2f}")
        assert entry['token_agreement'] == 1.0
    assert len(contexts) == 2 and plot.read_bytes().startswith(b'\x89PNG') and plot.stat().st_size > 20000


def test_audio_without_a_token_has_no_surprise(script, next_token_path, tmp_path, capsys):
    soundfile.write(tmp_path / 'short.wav', np.zeros(400), RATE)
    arguments = ['--model_path', str(next_token_path), '--audio_path', str(tmp_path / 'short.wav')]
    assert script.main([*arguments, '--surprise', '--surprise_plot', str(tmp_path / 'short.png')]) == 0
    assert 'nats per token' not in capsys.readouterr().out and (tmp_path / 'short.png').exists()


def test_a_model_that_predicts_no_next_tokens_has_no_surprise(script, model_path, audio_folder, capsys):
    arguments = ['--model_path', str(model_path), '--audio_path', str(audio_folder / 'mono.wav'), '--surprise']
    assert script.main(arguments) == 2
    assert 'model.objective next_token or both' in capsys.readouterr().err


@pytest.mark.parametrize(
    'changed, reason',
    [
        ({'--audio_path': 'gone.wav'}, 'gone.wav: there is no such file'),
        ({'--model_path': 'gone.nemo'}, 'gone.nemo: there is no such file'),
        ({'--model_path': 'text.wav'}, 'NeMo cannot restore it'),
        ({'--att_context_size': '[4]'}, '--att_context_size'),
        ({'--att_context_size': 'lowest'}, 'no preset is called'),
        ({'--att_context_size': '[4,-1]'}, 'cannot be streamed'),
    ],
)
def test_what_cannot_run_is_said(script, model_path, audio_folder, capsys, monkeypatch, changed, reason):
    monkeypatch.chdir(audio_folder)
    options = {'--model_path': str(model_path), '--audio_path': 'mono.wav', **changed}
    assert script.main([word for option in options.items() for word in option]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    'words',
    [
        ['--chunk_size', '0'],
        ['--stdin_rate', '8000'],
        ['--plot', 'no/folder/x.png'],
        ['--stdin_pcm'],
        ['--surprise_plot', 'no/x.png'],
        ['--surprise_reference', '3'],
        ['--surprise_plot', 'x.png', '--surprise_reference', '0'],
    ],
)
def test_wrong_options_are_refused(script, words):
    with pytest.raises(SystemExit):
        script.main(['--model_path', 'm.nemo', '--audio_path', 'a.wav', *words])


def test_a_report_that_cannot_be_finished_leaves_the_old_one(script, tmp_path):
    path = tmp_path / 'report.json'
    path.write_text('old')
    written = argparse.Namespace(model_path='m.nemo', chunk_size=1.0, report=path)
    with pytest.raises(TypeError):
        script.write_report(written, [], [{'audio': 'a.wav', 'error': object()}])
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.integration
def test_a_pipe(model_path, audio_folder, tmp_path):
    samples, _ = soundfile.read(audio_folder / 'mono.wav', dtype='float32')
    pcm = (samples * 30000).astype('<i2').tobytes()
    arguments = ['--model_path', model_path, '--stdin_pcm', '--compare_modes', '--report', tmp_path / 'r.json']
    result = run_python(SCRIPT, *arguments, input=pcm)
    assert result.returncode == 0, result.stderr
    entry = json.loads((tmp_path / 'r.json').read_text())['audio'][0]
    assert entry['audio'] == 'stdin' and entry['seconds'] == pytest.approx(1.0)
    assert all(context['largest_difference'] <= 1e-4 for context in entry['contexts'])
