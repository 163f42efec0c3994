# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_nest import POST_CONV, tiny_model

CONFIGS = Path(__file__).resolve().parents[4] / 'examples/asr/conf/ssl/nest'
CONTEXT = ('--context', '20')


@pytest.fixture(scope='module')
def script(load_example):
    return load_example('plot_contexts')


@pytest.fixture
def plot(script, tmp_path, capsys):
    """Return a function that runs the script; it gives the status, the output, the errors and the pictures."""

    def run(*options):
        pictures = tmp_path / 'new/pictures'
        status = script.main([str(option) for option in (*options, '--output', pictures)])
        made = {path.stem for path in pictures.glob('*.png')}
        assert made == {path.stem for path in pictures.glob('*.svg')}
        return (status, *capsys.readouterr(), made)

    return run


@pytest.fixture
def audio(speech_corpus):
    return sorted((speech_corpus / 'audio').iterdir())[0]


@pytest.mark.integration
@pytest.mark.parametrize(
    'overrides, pictures',
    [
        (['+model.encoder.layer_att_context_size=[[0,[4,0]]]'], {'masked_spectrogram'}),
        (POST_CONV, {'masked_spectrogram'}),
        (['+model.objective=next_token'], set()),
        (['+model.objective=both'], {'masked_spectrogram'}),
    ],
)
def test_a_model(plot, tmp_path, audio, overrides, pictures):
    tiny_model(*overrides).save_to(str(tmp_path / 'model.nemo'))
    given = ['--model', tmp_path / 'model.nemo', '--audio', audio, '--draws', '5', *CONTEXT]
    status, out, err, made = plot(*given, '--frame', '9')
    assert status == 0, err
    assert made == {*pictures, 'attention_windows'}
    assert ('audit of 5 draws in context [20, 0]' in out) == ('masked_spectrogram' in pictures)


@pytest.mark.integration
@pytest.mark.parametrize('context, look_ahead', [('[28,13]', '1040 ms'), ('[28,0]', '0 ms')])
def test_a_config_with_look_ahead(plot, audio, context, look_ahead):
    config = CONFIGS / 'nest_fast-conformer_streaming_multi_latency_tiny.yaml'
    status, out, err, made = plot('--config', config, '--audio', audio, '--draws', '20', '--context', context)
    assert status == 0, err
    assert made == {'masked_spectrogram', 'attention_windows'}
    assert f'look-ahead {look_ahead}:' in out and 'no visible frame in layers to stack: 0.0%' in out


@pytest.mark.integration
def test_a_config_and_logs(plot, tmp_path, audio):
    logger = TensorBoardLogger(tmp_path / 'run', name=None, version='')
    for step in (5, 10):
        logger.log_metrics({'val_loss/ctx_10_0': 3.0, 'val_accuracy/ctx_10_0': 0.1}, step=step)
    logger.finalize('success')
    given = [
        '--config',
        CONFIGS / 'nest_hierarchical_streaming_tiny.yaml',
        '--audio',
        audio,
        '--logs',
        tmp_path / 'run',
    ]
    status, out, err, made = plot(*given, '--frames', '100', '--draws', '2')
    assert status == 0, err
    assert made == {'masked_spectrogram', 'attention_windows', 'learning_curves'}
    assert 'no visible frame in layer_00 to stack: 0.0% of the masked attention frames' in out


@pytest.mark.parametrize(
    'given, message',
    [
        (['--logs', 'nowhere'], 'nowhere'),
        (['--config', 'no.yaml', '--audio', 'no.wav'], '--config no.yaml'),
        (['--model', 'no.nemo', '--audio', 'no.wav'], 'no.nemo'),
        (['--model', '{model}', '--audio', '{audio}', '--context', 'far'], "'far'"),
        (['--model', '{model}', '--audio', '{audio}', '--frame', '100000'], 'frame is 100000'),
    ],
)
def test_a_run_that_fails_draws_nothing(plot, tmp_path, audio, given, message):
    tiny_model('+model.objective=next_token').save_to(str(tmp_path / 'model.nemo'))
    status, _, err, made = plot(*(word.format(model=tmp_path / 'model.nemo', audio=audio) for word in given))
    assert status == 2 and message in err and not made
