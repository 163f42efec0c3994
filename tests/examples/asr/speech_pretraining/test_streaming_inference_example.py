# SPDX-License-Identifier: Apache-2.0
import io
import json
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
    path = tmp_path_factory.mktemp('model') / 'recogniser.nemo'
    tiny_recogniser('ctc').save_to(str(path))
    return path


@pytest.mark.parametrize('size', [1, 333, 2560])
def test_pcm_is_read_to_its_end(script, size):
    samples = (np.arange(1000, dtype='<i2') - 500) * 60
    pipe = io.BytesIO(samples.tobytes() + b'\x01')  # half a sample at the end counts for nothing
    pieces = list(script.pipe_pieces(pipe, RATE, RATE, size / RATE))
    joined = np.concatenate([piece[0].numpy() for piece in pieces])
    np.testing.assert_array_equal(joined, samples.astype(np.float32) / 32768)
    assert {piece.shape[1] for piece in pieces[:-1]} <= {size}


def test_pcm_of_another_rate_is_resampled_as_it_comes(script):
    tone = np.sin(np.arange(8000) * 0.3) * 20000
    pipe = io.BytesIO(tone.astype('<i2').tobytes())
    joined = np.concatenate([piece[0].numpy() for piece in script.pipe_pieces(pipe, RATE, 8000, 0.05)])
    assert abs(len(joined) - RATE) <= 16
    expected = np.sin(np.arange(len(joined)) * 0.15) * 20000 / 32768
    np.testing.assert_allclose(joined[500:-500], expected[500:-500], atol=0.01)


def test_a_manifest_goes_on_after_bad_files_and_the_status_shows_it(
    script, model_path, audio_folder, tmp_path, capsys
):
    manifest, output = audio_folder / 'texts.json', tmp_path / 'predictions.json'
    entries = [{'audio_filepath': 'cut.wav'}, {'audio_filepath': 'mono.wav', 'duration': 0.9, 'text': 'a ban'}]
    manifest.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    given = ['--model', str(model_path), '--manifest', str(manifest), '--output', str(output), '--confidence']
    assert script.main([*given, '--att-context-size', '[10,0]', '--step-seconds', '0.05']) == 2
    out, err = capsys.readouterr()
    assert err.count('streaming_inference_example: error:') == 1 and 'cut.wav' in err
    (entry,) = map(json.loads, output.read_text().splitlines())
    assert entry['text'] == 'a ban' and entry['duration'] == 0.9 and len(entry['pred_text']) > 3
    assert [word['text'] for word in entry['words']] == entry['pred_text'].split() == out.split('mono.wav:')[1].split()
    assert all(0 <= word['start'] < word['end'] and 0 <= word['confidence'] <= 1 for word in entry['words'])


@pytest.mark.parametrize(
    ('changed', 'reason'),
    [
        ({'--model': 'gone.nemo'}, 'gone.nemo: there is no such file'),
        ({'--model': 'text.wav'}, 'NeMo cannot restore it'),
        ({'--att-context-size': '[4]'}, '[4]'),
        ({'--att-context-size': '[4,-1]'}, 'cannot be streamed'),
        ({'--end-silence': '0'}, 'silence_after_speech is 0.0'),
        ({'--manifest': 'mono.wav'}, 'mono.wav'),
    ],
)
def test_what_cannot_run_ends_in_one_error(script, model_path, audio_folder, capsys, monkeypatch, changed, reason):
    monkeypatch.chdir(audio_folder)
    given = {'--model': str(model_path), **changed}
    audio = [] if '--manifest' in changed else ['mono.wav']
    assert script.main([*(word for option in given.items() for word in option), *audio]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count('streaming_inference_example: error:') == 1


def test_a_model_without_text_is_refused(script, audio_folder, tmp_path, capsys):
    tiny_model().save_to(str(tmp_path / 'ssl.nemo'))
    assert script.main(['--model', str(tmp_path / 'ssl.nemo'), str(audio_folder / 'mono.wav')]) == 2
    assert 'text needs a CTC, RNNT or hybrid model' in capsys.readouterr().err


@pytest.mark.parametrize(
    'words', [['a.wav', '--step-seconds', '0'], ['-', '--sample-rate', '0'], [], ['a.wav', '--output', 'no/x']]
)
def test_wrong_options_are_refused(script, words):
    with pytest.raises(SystemExit) as ended:
        script.main(['--model', 'm.nemo', *words])
    assert ended.value.code == 2


@pytest.mark.integration
def test_a_pipe(script, model_path, audio_folder, tmp_path):
    samples, _ = soundfile.read(audio_folder / 'mono.wav', dtype='float32')
    pcm = (samples * 30000).astype('<i2').tobytes()
    result = run_python(SCRIPT, '--model', model_path, '-', '--output', tmp_path / 'made.json', input=pcm)
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / 'made.json').read_text())['pred_text']) > 3
