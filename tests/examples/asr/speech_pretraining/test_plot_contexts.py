# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_nest import tiny_model

CONFIGS = Path(__file__).resolve().parents[4] / 'examples/asr/conf/ssl/nest'


@pytest.fixture
def plot(load_example, capsys):
    script = load_example('plot_contexts')

    def run(*options):
        status = script.main([str(option) for option in options])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope='session')
def audio(speech_corpus):
    return sorted((speech_corpus / 'audio').iterdir())[0]


def made(folder):
    return sorted(path.name for path in folder.iterdir())


def both(*names):
    return sorted(f'{name}.{ending}' for name in names for ending in ('png', 'svg'))


@pytest.mark.integration
@pytest.mark.parametrize('position', ['pre_conv', 'post_conv'])
def test_a_model(plot, tmp_path, audio, position):
    overrides = [f'model.mask_position={position}', '+model.encoder.layer_att_context_size=[[0,[4,0]]]']
    overrides += ['model.quantizer.combine_time_steps=1'] * (position == 'post_conv')
    tiny_model(*overrides).save_to(str(tmp_path / 'model.nemo'))
    given = ['--model', tmp_path / 'model.nemo', '--audio', audio, '--draws', '5']
    status, out, err = plot(*given, '--context', '20', '--frame', '9', '--output', tmp_path / 'new/pictures')
    assert status == 0, err
    assert made(tmp_path / 'new/pictures') == both('masked_spectrogram', 'attention_windows')
    assert 'audit of 5 draws in context [20, 0]' in out and 'no visible frame in layers' in out
    before = (tmp_path / 'new/pictures/masked_spectrogram.png').read_bytes()
    assert plot(*given, '--context', '20', '--output', tmp_path / 'new/pictures')[0] == 0
    assert (tmp_path / 'new/pictures/masked_spectrogram.png').read_bytes() == before


@pytest.mark.integration
@pytest.mark.parametrize('objective, pictures', [('next_token', []), ('both', ['masked_spectrogram'])])
def test_what_surprises_a_model_of_next_tokens(plot, tmp_path, audio, objective, pictures):
    tiny_model(f'+model.objective={objective}').save_to(str(tmp_path / 'model.nemo'))
    given = ['--model', tmp_path / 'model.nemo', '--audio', audio, '--draws', '5', '--context', '20']
    status, out, err = plot(*given, '--output', tmp_path / 'pictures')
    assert status == 0, err
    assert made(tmp_path / 'pictures') == both('surprise', 'attention_windows', *pictures)
    assert ('audit of 5 draws' in out) == (objective == 'both')
    assert plot(*given, '--context', '[-1,-1]', '--output', tmp_path / 'none')[0] == 2


@pytest.mark.integration
@pytest.mark.parametrize('context, wait', [('[28,13]', '1040 ms'), ('[28,0]', '0 ms')])
def test_a_context_with_look_ahead(plot, tmp_path, audio, context, wait):
    config = CONFIGS / 'nest_fast-conformer_streaming_multi_latency_tiny.yaml'
    given = ['--config', config, '--audio', audio, '--draws', '20', '--context', context]
    status, out, err = plot(*given, '--output', tmp_path / 'pictures')
    assert status == 0, err
    assert made(tmp_path / 'pictures') == both('masked_spectrogram', 'attention_windows')
    assert f'look-ahead {wait}:' in out and 'no visible frame in layers to stack: 0.0%' in out


@pytest.mark.integration
def test_a_config_and_logs(plot, tmp_path, audio):
    logger = TensorBoardLogger(tmp_path / 'run', name=None, version='')
    for step in (5, 10):
        logger.log_metrics({'val_loss/ctx_10_0': 3.0, 'val_accuracy/ctx_10_0': 0.1}, step=step)
    logger.finalize('success')
    config = CONFIGS / 'nest_hierarchical_streaming_tiny.yaml'
    given = ['--config', config, '--audio', audio, '--logs', tmp_path / 'run', '--frames', '100', '--draws', '2']
    status, out, err = plot(*given, '--output', tmp_path / 'pictures')
    assert status == 0, err
    assert made(tmp_path / 'pictures') == both('masked_spectrogram', 'attention_windows', 'learning_curves')
    assert 'no visible frame in layer_00 to stack: 0.0% of the masked attention frames' in out


@pytest.mark.parametrize(
    'given, message',
    [
        (['--logs', 'nowhere'], 'nowhere: there is no such file or folder'),
        (['--config', 'no.yaml', '--audio', 'no.wav'], '--config no.yaml: there is no such file'),
        (['--model', 'no.nemo', '--audio', 'no.wav'], 'no.nemo: there is no such file'),
    ],
)
def test_what_is_not_there(plot, tmp_path, given, message):
    status, _, err = plot(*given, '--output', tmp_path / 'pictures')
    assert status == 2 and message in err and not (tmp_path / 'pictures').exists()


@pytest.mark.integration
@pytest.mark.parametrize(
    'given, message',
    [
        (['--context', 'far'], "no preset is called 'far'"),
        (['--frame', '100000'], 'frame is 100000; the utterance has attention frames 0 to'),
    ],
)
def test_what_does_not_fit_the_model(plot, tmp_path, audio, given, message):
    tiny_model().save_to(str(tmp_path / 'model.nemo'))
    here = ['--model', tmp_path / 'model.nemo', '--audio', audio, '--draws', '1']
    status, _, err = plot(*here, *given, '--output', tmp_path / 'pictures')
    assert status == 2 and message in err and not (tmp_path / 'pictures').exists()


def test_bad_arguments(load_example, capsys):
    script = load_example('plot_contexts')
    for bad, message in (
        ([], 'nothing to draw'),
        (['--audio', 'a.wav'], '--audio goes with --model or --config'),
        (['--model', 'a.nemo', '--config', 'a.yaml'], '--audio goes with --model or --config'),
        (['--logs', 'run', '--frames', '0'], '--frames is 0'),
    ):
        with pytest.raises(SystemExit) as ended:
            script.arguments([*bad, '--output', 'pictures'])
        assert ended.value.code == 2 and message in capsys.readouterr().err
