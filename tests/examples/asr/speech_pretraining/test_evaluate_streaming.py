# SPDX-License-Identifier: Apache-2.0
"""The two scripts that stream audio: ``evaluate_streaming`` and ``streaming_inference_example``."""

import io
import json

import numpy as np
import pytest
import soundfile
from fresh_process import run_python
from tiny_nest import tiny_model
from tiny_recogniser import tiny_recogniser

RATE = 16000
SCRIPTS = ['evaluate_streaming', 'streaming_inference_example']


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    contexts = 'model.encoder.att_context_size=[[4,0],[8,0],[-1,-1]]'
    tiny_model(contexts, '+model.objective=next_token').save_to(str(folder / 'next.nemo'))
    for kind in ('ctc', 'rnnt'):
        tiny_recogniser(kind).save_to(str(folder / f'{kind}.nemo'))
    return folder


@pytest.fixture
def run(load_example, models, audio_folder, monkeypatch, capsys):
    """Return a function that runs a script in the folder of the audio; it gives the status, the output and errors."""
    monkeypatch.chdir(audio_folder)

    def run(name, model, *options):
        status = load_example(name).main(['--model', str(models / model), *map(str, options)])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def manifest(tmp_path, audio_folder):
    """Two files of noise, with a text, behind one that is cut off."""
    soundfile.write(tmp_path / 'long.wav', np.random.default_rng(0).standard_normal(40000) * 0.1, RATE)
    entries = [{'audio_filepath': str(audio_folder / 'cut.wav')}]
    entries += [{'audio_filepath': str(audio_folder / 'mono.wav'), 'duration': 0.9, 'text': 'a ban'}]
    entries += [{'audio_filepath': 'long.wav', 'text': 'ben'}]
    (tmp_path / 'manifest.json').write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    return tmp_path / 'manifest.json'


def test_the_contexts_of_a_model_of_next_tokens(run, manifest, tmp_path):
    given = ['--manifest', manifest, '--surprise', '--output', tmp_path / 'report.json']
    status, out, err = run(SCRIPTS[0], 'next.nemo', *given)
    assert status == 2 and err.count(f'{SCRIPTS[0]}: error:') == 1 and 'cut.wav' in err
    assert [word for word in ('[4, 0]', '[8, 0]', 'surprise', '2 audios') if word not in out] == []
    assert 'WER' not in out and '-1' not in out  # what the model does not have
    content = json.loads((tmp_path / 'report.json').read_text())
    assert [entry['att_context_size'] for entry in content['contexts']] == [[4, 0], [8, 0]]
    assert len(content['failed']) == 1 and len(content['audio']) == 2
    for entry in content['contexts']:
        assert entry['largest_difference'] <= 1e-4 and entry['token_agreement'] == 1.0
        assert entry['look_ahead_ms'] == 12.5 and entry['cache_bytes_per_stream'] > 0


def test_error_rates_and_latencies_of_a_recogniser(run, manifest, tmp_path):
    given = ['--manifest', manifest, '--att-context-size', '[10,0]', '4', '--output', tmp_path / 'report.json']
    status, out, _ = run(SCRIPTS[0], 'rnnt.nemo', *given)
    assert status == 2 and 'WER' in out and 'latency' in out and 'surprise' not in out
    content = json.loads((tmp_path / 'report.json').read_text())
    assert [entry['att_context_size'] for entry in content['contexts']] == [[10, 0], [4, 0]]
    assert all(entry['wer'] > 0 and entry['cer'] > 0 for entry in content['contexts'])
    assert len(content['audio'][0]['contexts'][0]['pred_text']) > 3


def test_a_transcript_of_a_manifest(run, manifest, tmp_path):
    given = ['--manifest', manifest, '--output', tmp_path / 'made.json', '--confidence', '--step-seconds', '0.05']
    status, out, err = run(SCRIPTS[1], 'ctc.nemo', *given, '--att-context-size', '[10,0]')
    assert status == 2 and err.count(f'{SCRIPTS[1]}: error:') == 1 and 'cut.wav' in err
    entry, _ = map(json.loads, (tmp_path / 'made.json').read_text().splitlines())
    assert entry['text'] == 'a ban' and entry['duration'] == 0.9 and len(entry['pred_text']) > 3
    assert [word['text'] for word in entry['words']] == entry['pred_text'].split()
    assert entry['pred_text'].split() == out.split('mono.wav:')[1].split('\n')[1].split()
    assert all(0 <= word['start'] < word['end'] and 0 <= word['confidence'] <= 1 for word in entry['words'])


@pytest.mark.integration
def test_a_transcript_of_a_pipe(load_example, models, audio_folder, tmp_path):
    samples, _ = soundfile.read(audio_folder / 'mono.wav', dtype='float32')
    words = ['--model', models / 'ctc.nemo', '-', '--output', tmp_path / 'made.json']
    done = run_python(load_example(SCRIPTS[1]).__file__, *words, input=(samples * 30000).astype('<i2').tobytes())
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / 'made.json').read_text())['pred_text']) > 3


@pytest.mark.parametrize('size', [1, 333, 2560])
def test_pcm_is_read_to_its_end(load_example, size):
    samples = (np.arange(1000, dtype='<i2') - 500) * 60
    pipe = io.BytesIO(samples.tobytes() + b'\x01')  # half a sample at the end is ignored
    pieces = list(load_example(SCRIPTS[1]).pipe_pieces(pipe, RATE, RATE, size / RATE))
    joined = np.concatenate([piece[0].numpy() for piece in pieces])
    np.testing.assert_array_equal(joined, samples.astype(np.float32) / 32768)
    assert {piece.shape[1] for piece in pieces[:-1]} <= {size}


def test_pcm_of_another_rate_is_resampled_as_it_comes(load_example):
    pipe = io.BytesIO((np.sin(np.arange(8000) * 0.3) * 20000).astype('<i2').tobytes())
    pieces = load_example(SCRIPTS[1]).pipe_pieces(pipe, RATE, 8000, 0.05)
    joined = np.concatenate([piece[0].numpy() for piece in pieces])
    assert abs(len(joined) - RATE) <= 16
    expected = np.sin(np.arange(len(joined)) * 0.15) * 20000 / 32768
    np.testing.assert_allclose(joined[500:-500], expected[500:-500], atol=0.01)


BOTH = [
    ('gone.nemo', ['mono.wav'], 'gone.nemo'),
    ('ctc.nemo', ['mono.wav', '--att-context-size', '[4,-1]'], 'cannot be streamed'),
    ('ctc.nemo', ['mono.wav', '--att-context-size', 'lowest'], 'lowest'),
    ('ctc.nemo', ['--manifest', 'mono.wav'], 'mono.wav'),
]


@pytest.mark.parametrize(
    'name, model, options, message',
    [
        *((name, *case) for name in SCRIPTS for case in BOTH),
        (SCRIPTS[0], 'ctc.nemo', ['mono.wav', '--surprise'], 'model.objective'),
        (SCRIPTS[1], 'ctc.nemo', ['mono.wav', '--end-silence', '0'], 'silence_after_speech is 0.0'),
        (SCRIPTS[1], 'next.nemo', ['mono.wav'], 'text needs a CTC, RNNT or hybrid model'),
    ],
)
def test_a_run_that_cannot_work_ends_in_one_error(run, name, model, options, message):
    status, _, err = run(name, model, *options)
    assert status == 2 and message in err and err.count(f'{name}: error:') == 1
